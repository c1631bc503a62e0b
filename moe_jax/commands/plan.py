"""``moe-jax plan``: its words; what it does is in ``moe_jax/planning/command.py``."""

import pathlib

from moe_jax.commands.parsers import add_command


def add(commands) -> None:
    plan = add_command(commands, "plan", run, "What a config needs and takes on a TPU slice that need not be there: memory, "
                       "collectives, time. Compiles the real step for it, on this machine's CPU.", overrides=True,
                       prepare=prepare)
    plan.add_argument("--config", required=True, help="a config file, e.g. configs/mixtral_8x7b.py, or a model by family "
                      "and size, e.g. mixtral:8x22b")
    plan.add_argument("--slice", default="", help="v5p-128 (a product's name), v5p:4x4x4 (a topology) or '2x v6e-256' "
                      "(several slices); must be given")
    plan.add_argument("--mesh", default="", help="data=8,expert=8: devices along data, fsdp, expert and tensor; data takes "
                      "what remains, others are 1 if they are not named (default: the config's)")
    plan.add_argument("--step", default="train", help="train, prefill or decode (default: %(default)s)")
    plan.add_argument("--batch", type=int, help="sequences per step (default: the config's data.batch_size)")
    plan.add_argument("--context", type=int, help="tokens per sequence; for decode, those in the cache (default: the "
                      "config's data.sequence_length)")
    plan.add_argument("--search", nargs="?", type=int, const=0, metavar="N", help="plan every legal mesh by formula and "
                      "compile the best N (default: 3)")
    plan.add_argument("--formula", action="store_true", help="do not compile: seconds instead of minutes")
    plan.add_argument("--no-cache", action="store_true", help="compile again what was compiled before")
    plan.add_argument("--json", action="store_true", help="print JSON, and draw only what --out names")
    plan.add_argument("--out", default="", metavar="PNG", help="the picture (default: plan.png)")


def prepare(arguments) -> None:
    from moe_jax.planning.slices import prepare_environment
    prepare_environment()


def run(arguments, overrides) -> int:
    from moe_jax.config import is_named, load_config
    from moe_jax.planning import command

    named = is_named(arguments.config)
    request = command.Request(
        name=arguments.config if named else pathlib.Path(arguments.config).stem, slice=arguments.slice, mesh=arguments.mesh,
        step=arguments.step, batch=arguments.batch, context=arguments.context, search=arguments.search,
        formula=arguments.formula, cache=not arguments.no_cache, json=arguments.json, out=arguments.out)
    command.check_request(request)
    config = load_config(arguments.config, overrides)
    return command.run(config, command.without_a_file(request, overrides) if named else request)
