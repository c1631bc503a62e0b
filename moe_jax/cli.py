"""The command line: ``moe-jax train|eval|generate|report|place|plan``."""

import argparse
import json
import logging
import math
import os
import pathlib
import re
import sys

from moe_jax.environment import prepare_process

_EPILOG = """\
settings:
  Every setting of a config can be overridden: --config.moe.num_experts=16 --config.training.num_steps=1000
  configs/base.py lists them all with a comment each.

examples:
  moe-jax train --config=configs/openmoe_tiny.py --workdir=workdir
  moe-jax train --config=configs/openmoe_tiny.py --workdir=top1 --config.moe.experts_per_token=1
  moe-jax eval --workdir=workdir
  moe-jax generate --workdir=workdir --prompt='def main():'
  moe-jax report --workdir=workdir
  moe-jax place --workdir=workdir --devices=4 --redundant=4
  moe-jax plan --config=configs/mixtral_8x7b.py --slice=v5p-128
"""


_DEVICES = 8


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code. Errors a user can mend are one line on stderr and code 1 (2: usage)."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    unknown = [word for word in rest if not word.startswith("--config.")]
    if unknown or (rest and arguments.command not in ("train", "eval", "plan")):
        parser.error(f"unknown argument {(unknown or rest)[0]!r}; see moe-jax {arguments.command} --help")
    # Text that the terminal's encoding, or any encoding, does not have must not end a command.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("moe_jax").setLevel(logging.INFO)
    _quieten_libraries()
    try:
        if arguments.command == "plan":
            from moe_jax.planning.slices import prepare_environment
            prepare_environment()
        elif arguments.command == "place":  # its --devices are those of the placement
            os.environ["JAX_PLATFORMS"] = "cpu"
            prepare_process(1)
        elif arguments.command != "report":
            prepare_process(_devices(arguments))
            _join_processes(arguments)
        return _leave_processes(arguments.run(arguments, rest))
    except _errors() as error:
        print(f"moe-jax {arguments.command}: error: {error}", file=sys.stderr)
        return _leave_processes(1, str(error))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return _leave_processes(130, "interrupted")
    except Exception as error:  # a fault of ours, or of JAX; with several processes perhaps of a peer
        if "moe_jax.training.processes" in sys.modules:
            sys.modules["moe_jax.training.processes"].fail(error)
        raise


def _join_processes(arguments) -> None:
    """Makes this process one of several, where the command says so; before anything asks JAX for a device."""
    flags = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [flag for flag, value in flags.items() if value is None]
    if len(missing) == len(flags) and not arguments.distributed:
        if arguments.timeout is not None:
            raise CommandError(f"--timeout={arguments.timeout:g}: has no effect on a single process; leave it out")
        return
    if arguments.distributed and len(missing) < len(flags):
        raise CommandError("--distributed finds the other processes by itself; leave it out, or --coordinator, "
                           "--num-processes and --process-id")
    if missing and not arguments.distributed:
        raise CommandError(f"{', '.join(missing)} missing: --coordinator, --num-processes and --process-id belong together")
    coordinator, count, number = flags.values()
    if not arguments.distributed:
        if not re.fullmatch(r".+:\d+", coordinator):
            raise CommandError(f"--coordinator={coordinator}: must be HOST:PORT, an address of process 0 and a free port there")
        if count < 1 or not 0 <= number < count:
            raise CommandError(f"--process-id={number}: must be from 0 to --num-processes - 1 = {count - 1}")
    if arguments.timeout is not None and not 10 <= arguments.timeout < math.inf:
        raise CommandError(f"--timeout={arguments.timeout:g}: must be at least 10 seconds")
    from moe_jax.training import processes
    processes.start(coordinator, count, number, arguments.timeout or processes.TIMEOUT)
    if processes.index() != 0:
        logging.getLogger("moe_jax").setLevel(logging.WARNING)


def _leave_processes(code: int, why: str = "") -> int:
    """The end of this process's part, where there are several; hands the exit code through."""
    if "moe_jax.training.processes" in sys.modules:
        processes = sys.modules["moe_jax.training.processes"]
        together = code == 0 or processes.agreed_to_stop()
        processes.leave(None if together else why or f"it stopped with exit code {code}", code)
    return code


def _quieten_libraries() -> None:
    """Where a disk is full, Orbax and TensorStore print hundreds of lines of tracebacks around the one that we print."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # Orbax writes every array in a task of its own and awaits them up to the first that fails; at exit, asyncio logs
    # each of the others with its traceback.
    logging.getLogger("asyncio").addFilter(_is_news)

    def hook(unraisable):
        # TensorStore's threads, which finish after Orbax has given up.
        if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


def _is_news(record: logging.LogRecord) -> bool:
    return "never retrieved" not in record.getMessage()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-jax", description="Train mixture-of-experts language models and look inside them.", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|eval|generate|report|place|plan")

    def add(name, function, text):
        command = commands.add_parser(name, help=text, description=text, epilog=_EPILOG, allow_abbrev=False,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_argument("--workdir", default="workdir", help="the run directory (default: %(default)s)")
        if name != "report":
            command.add_argument("--devices", type=int, help="CPU devices to pretend to have where there is no "
                                 f"accelerator (default: {_DEVICES if name == 'train' else 'as in training'})")
            _add_processes(command)
        command.set_defaults(run=function)
        return command

    train = add("train", _train, "Train a model; the same command again resumes, or says that the run is complete.")
    train.add_argument("--config", required=True, help="a config file, e.g. configs/openmoe_tiny.py")
    train.add_argument("--allow-config-change", action="store_true",
                       help="continue a run directory that was started with other settings")
    evaluate = add("eval", _eval, "Evaluate a run's newest checkpoint: cross-entropy, bits per byte, by domain.")
    evaluate.add_argument("--dispatch", default="", help="dropless, gather, einsum or reference "
                          "(default: the config's moe.eval_dispatch)")
    evaluate.add_argument("--batches", type=int, default=0, help="validation batches (default: all of them)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    _add_placement(evaluate)
    generate = add("generate", _generate, "Sample text from a run's newest checkpoint.")
    generate.add_argument("--prompt", action="append",
                          help="text to continue; may be given several times (default: the empty text)")
    generate.add_argument("--max-tokens", type=int, default=200, help="tokens to add (default: %(default)s)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 = greedy (default: %(default)s)")
    generate.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens only; 0 = all "
                          "(default: %(default)s)")
    generate.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this total "
                          "probability (default: %(default)s)")
    generate.add_argument("--seed", type=int, default=0, help="another seed, another sample (default: %(default)s)")
    _add_placement(generate)
    _add_place(commands)
    add("report", _report, "Write report.html of a run directory again, finished or not.")
    _add_plan(commands)
    return parser


def _add_processes(command) -> None:
    several = command.add_argument_group("several processes", "The same command on every host; see docs/tpu.md.")
    several.add_argument("--distributed", action="store_true", help="join the other processes of a cluster that JAX knows: TPU "
                         "slices (TPU VMs, GKE), Slurm, Open MPI")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="elsewhere: the address of process 0")
    several.add_argument("--num-processes", type=int, metavar="N", help="elsewhere: how many processes there are")
    several.add_argument("--process-id", type=int, metavar="I", help="elsewhere: which one this is, from 0")
    several.add_argument("--timeout", type=float, metavar="SECONDS", help="how long to wait for the others, at the start, at "
                         "barriers and in a step (default: 300)")


def _add_placement(command) -> None:
    command.add_argument("--placement", default="", help="a file of moe-jax place: experts, and copies of the busy ones, lie as "
                         "it says; the outputs are the same")


def _add_place(commands) -> None:
    text = "Place a run's experts on devices by the loads it measured: copies of busy experts, even loads."
    command = commands.add_parser("place", help=text, description=text, epilog=_EPILOG, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--workdir", default="workdir", help="the run directory (default: %(default)s)")
    command.add_argument("--devices", type=int, required=True, help="over how many devices the experts are spread")
    command.add_argument("--nodes", type=int, default=1, help="into how many nodes the devices fall; they get whole groups of "
                         "experts (moe.num_groups) (default: %(default)s)")
    command.add_argument("--redundant", type=int, default=0,
                         help="copies beside one of each expert, for evaluation and generation (default: %(default)s)")
    command.add_argument("--out", default="placement.json",
                         help="the file to write; a figure with the ending .png comes beside it (default: %(default)s)")
    command.add_argument("--apply", default="", metavar="DIRECTORY", help="also write a new run directory, whose newest checkpoint "
                         "has the experts in this order; train, eval and generate go on there (without --redundant)")
    command.set_defaults(run=_place)


def _add_plan(commands) -> None:
    text = ("What a config needs and takes on a TPU slice that need not be there: memory, collectives, time. Compiles the "
            "real step for it, on this machine's CPU.")
    plan = commands.add_parser("plan", help=text.split(":")[0] + ".", description=text, epilog=_EPILOG, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    plan.add_argument("--config", required=True, help="a config file, e.g. configs/mixtral_8x7b.py")
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
    plan.set_defaults(run=_plan)


def _errors() -> tuple[type[Exception], ...]:
    """The errors whose message is written for the user. Modules not imported yet cannot have raised theirs."""
    names = {"moe_jax.config": "ConfigError", "moe_jax.data.documents": "CorpusError",
             "moe_jax.analysis.report": "ReportError", "moe_jax.analysis.placement": "PlacementError", "moe_jax.planning.slices": "PlanError",
             "moe_jax.training.checkpoint": "CheckpointError", "moe_jax.training.metrics": "MetricsError",
             "moe_jax.training.run": "RunError", "moe_jax.training.loop": "NonFiniteError",
             "moe_jax.training.processes": "ProcessError"}
    return (CommandError, *(getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules))


class CommandError(ValueError):
    """An argument that cannot work."""


def _devices(arguments) -> int:
    """--devices, checked; without it, for commands on an existing run, as many as the run was trained with."""
    devices = arguments.devices
    if devices is None:
        asked = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
        devices = int(asked.group(1)) if asked else _DEVICES
        if arguments.command != "train":
            processes = arguments.num_processes or 1
            try:
                versions = json.loads((pathlib.Path(arguments.workdir) / "versions.json").read_text())
                devices = max(1, int(versions["device_count"]) // processes) if versions["backend"] == "cpu" else _DEVICES
            except (OSError, ValueError, KeyError, TypeError):
                pass  # no run: the command will say so
    if devices < 1:
        raise CommandError(f"--devices={devices}: must be at least 1")
    return devices


def load_config(path: str, overrides: list[str]):
    """A config file with ``--config.section.name=value`` overrides, resolved and checked.

    Raises:
      ConfigError: no such file, a file without get_config(), an unknown key, or a value that does not fit.
    """
    from absl import flags
    from ml_collections import config_flags

    from moe_jax.config import ConfigError, known_keys, resolve, unknown_key

    if not pathlib.Path(path).is_file():
        raise ConfigError(f"--config={path}: there is no such file; configs/openmoe_tiny.py is one to start from.")
    for word in overrides:
        key = word.removeprefix("--config.").split("=", 1)[0]
        if key not in known_keys():
            raise unknown_key(key)
        if "=" not in word:
            raise ConfigError(f"{word}: a value is missing, as in {word}=1.")
    values, argv = flags.FlagValues(), ["moe-jax", f"--config={path}", *overrides]
    _make_importable(pathlib.Path(path).resolve().parent)
    # Overrides are looked for in sys.argv unless another list is given.
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    # Each file is loaded into this one module and would inherit get_config() from the file before it.
    sys.modules.pop("config_config", None)
    try:
        values(argv)
        config = values.config
    except flags.IllegalFlagValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except Exception as error:  # whatever the user's own file raises
        raise ConfigError(f"--config={path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not hasattr(config, "to_dict"):
        raise ConfigError(f"--config={path}: get_config() returned {config!r}, not a ConfigDict; see configs/base.py.")
    return resolve(config)


def _make_importable(folder: pathlib.Path) -> None:
    """Lets a config file import its neighbours, as in ``from configs.base import get_config``: an installed command,
    unlike ``python -m``, does not look in the current folder."""
    root = str(folder.parent if (folder / "__init__.py").exists() else folder)
    if root not in sys.path:
        sys.path.insert(0, root)


def _train(arguments, overrides) -> int:
    config = load_config(arguments.config, overrides)
    from moe_jax.training import processes
    from moe_jax.training.loop import Interrupted, train
    from moe_jax.training.run import check_config_matches_mesh
    import jax

    check_config_matches_mesh(config, jax.device_count())
    if processes.index() == 0:
        _print_config(config)
    try:
        train(config, arguments.workdir, arguments.allow_config_change)
    except Interrupted as interrupted:
        return interrupted.code
    return 0


def _print_config(config) -> None:
    from moe_jax.training.metrics import versions
    for section, values in config.to_dict().items():
        print(f"{section}: " + ", ".join(f"{name}={value!r}" for name, value in values.items()), file=sys.stderr)
    print("versions: " + ", ".join(f"{name} {value}" for name, value in versions().items() if value), file=sys.stderr)


def _open(arguments, overrides=()):
    """The run in ``--workdir``, with the config it was trained with."""
    import jax

    from moe_jax.config import resolve
    from moe_jax.training import processes
    from moe_jax.training.run import (
        check_config_matches_mesh, open_run, read_config, require_checkpoint, require_equal_processes)
    workdir = pathlib.Path(arguments.workdir).absolute()
    values = read_config(workdir)
    require_checkpoint(workdir)
    for word in overrides:
        section, name, value = _parse_override(word)
        values.setdefault(section, {})[name] = value
    config = resolve(values)
    check_config_matches_mesh(config, jax.device_count())
    own = ("run", "process_id", "workdir")  # of this process, or compared anyway
    words = {f"--{name.replace('_', '-')}": value for name, value in vars(arguments).items() if name not in own}
    require_equal_processes(config, workdir, **words)
    processes.at("evaluation or generation", processes.COMPILING)
    return open_run(config, workdir)


def _open_params(arguments, overrides=()):
    """(run, parameters, router bias, step, placement or None): what evaluation and generation start from."""
    from moe_jax.config import ConfigError
    from moe_jax.training.run import restore_params

    if not arguments.placement:
        run = _open(arguments, overrides)
        if run.config.moe.expert_copies:
            raise ConfigError(f"moe.expert_copies={run.config.moe.expert_copies}: which expert each is a copy of is said by a "
                              f"placement; give --placement=… instead.")
        return run, *restore_params(run), None
    from moe_jax.analysis.placement import read_placement
    from moe_jax.training.rearrange import restore_with_copies
    placed = read_placement(pathlib.Path(arguments.placement), pathlib.Path(arguments.workdir).absolute())
    copies = placed.placement.expert_LP.shape[1]
    run = _open(arguments, [*overrides, f"--config.moe.expert_copies={copies}"])
    return run, *restore_with_copies(run, placed.placement), placed


def _parse_override(word: str):
    """(section, name, value) of ``--config.section.name=value``, by the type that the setting has."""
    import dataclasses

    from moe_jax.config import SECTIONS, ConfigError, known_keys, unknown_key
    key, equals, text = word.removeprefix("--config.").partition("=")
    if key not in known_keys():
        raise unknown_key(key)
    if not equals:
        raise ConfigError(f"{word}: a value is missing, as in {word}=1.")
    section, name = key.split(".")
    kind = next(field.type for field in dataclasses.fields(SECTIONS[section]) if field.name == name)
    try:
        if kind is bool:
            return section, name, {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return section, name, kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{key}={text!r}: must be of type {kind.__name__}.") from None


def _eval(arguments, overrides) -> int:
    import dataclasses

    from moe_jax.dispatch import DISPATCHERS
    from moe_jax.nn.moe import RoutingMode
    from moe_jax.training import processes
    from moe_jax.training.evaluate import Evaluator, drop_fraction, loss_summary
    from moe_jax.training.loop import CAUSAL

    if arguments.dispatch and arguments.dispatch not in DISPATCHERS:
        raise CommandError(f"--dispatch={arguments.dispatch}: allowed are {', '.join(DISPATCHERS)}")
    if arguments.batches < 0:
        raise CommandError(f"--batches={arguments.batches}: must be at least 1, or 0 for all of them")
    run, params, bias_LE, step, placed = _open_params(arguments, overrides)
    mode = RoutingMode.evaluation(run.config, record=True)
    if arguments.dispatch:
        mode = dataclasses.replace(mode, dispatch=arguments.dispatch)
    evaluator = Evaluator(run.config, run.vocab_size, run.data.vocabulary.bytes_per_token_V, run.data.domains, run.mesh)

    def sums(mode):
        return evaluator.sums(params, bias_LE, run.validation_batches(arguments.batches or None), mode)

    found = sums(mode)
    result = {"step": step, "dispatch": mode.dispatch if run.config.moe_layers else "dense",
              **loss_summary(found, run.data.domains)}
    if run.config.moe_layers:
        result["drop_fraction"] = drop_fraction(found)
    if placed is not None:
        from moe_jax.analysis.placement import measured
        result["placement"] = measured(found["counts_LE"], found["copies_LP"], placed)
    if not mode.is_causal(run.config):
        causal = loss_summary(sums(RoutingMode.causal(run.config, record=True)), run.data.domains)
        result["causal"] = {"ce": causal["ce"], "bits_per_byte": causal["bits_per_byte"], "how": CAUSAL}
    if processes.index() != 0:
        return 0
    if arguments.json:
        print(json.dumps(result))
    else:
        _print_evaluation(result)
    return 0


def _print_evaluation(result) -> None:
    def text(part):
        per_byte = part["bits_per_byte"]
        return f"{part['ce']:.4f} nats per token" + (f", {per_byte:.4f} bits per byte" if per_byte else "")

    drops = f", {100 * result['drop_fraction']:.1f} % of choices dropped" if "drop_fraction" in result else ""
    print(f"step {result['step']}, {result['dispatch']}: {text(result)} over {result['tokens']:,} tokens{drops}")
    for name, part in result["domains"].items():
        print(f"  {name:<16} {text(part)}, {part['tokens']:,} tokens")
    if "causal" in result:
        print(f"  not causal: the router saw later tokens. Routed causally: {text(result['causal'])} "
              f"({result['causal']['how']})")
    if "placement" in result:
        from moe_jax.analysis.placement import rows
        placed = result["placement"]
        print(f"{placed['copies']} copies of experts on {placed['devices']} devices, largest / mean load measured:")
        print("\n".join(rows(placed["layers"], placed["imbalance_without"], placed["imbalance_with"])))


def _generate(arguments, overrides) -> int:
    del overrides
    import numpy as np

    from moe_jax.inference.generate import Sampling, generate
    from moe_jax.training import processes

    try:
        sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    except ValueError as error:
        raise CommandError(f"--{str(error).replace('_', '-', 1)}") from error
    if not math.isfinite(arguments.temperature):
        raise CommandError(f"--temperature={arguments.temperature}: must be a finite number")
    if not 0 <= arguments.seed < 2**32:
        raise CommandError(f"--seed={arguments.seed}: must be at least 0 and below 2**32")
    if arguments.max_tokens < 1:
        raise CommandError(f"--max-tokens={arguments.max_tokens}: must be at least 1")
    run, params, bias_LE, step, _ = _open_params(arguments)
    vocabulary = run.data.vocabulary
    prompts = arguments.prompt or [""]
    ids = generate(params, run.config, run.vocab_size, [np.asarray(vocabulary.encode(p)).tolist() for p in prompts],
                   arguments.max_tokens, sampling, arguments.seed, bias_LE, vocabulary.eos_id, vocabulary.vocab_size)
    for prompt, sample in zip(prompts, ids) if processes.index() == 0 else ():
        print(f"--- step {step}\n{prompt}{vocabulary.decode(sample)}")
    return 0


def _place(arguments, overrides) -> int:
    del overrides
    from moe_jax.analysis import placement

    workdir, out = pathlib.Path(arguments.workdir).absolute(), pathlib.Path(arguments.out).absolute()
    if out.suffix != ".json":
        raise CommandError(f"--out={arguments.out}: must end in .json; the figure's name ends in .png instead")
    if not out.parent.is_dir():
        raise CommandError(f"--out={arguments.out}: there is no folder {out.parent}")
    if arguments.apply and arguments.redundant:
        raise CommandError(f"--apply={arguments.apply}: copies would grow apart in training; leave out --redundant="
                           f"{arguments.redundant}, or evaluate with copies: moe-jax eval --placement={arguments.out}")
    placed = placement.place_run(workdir, arguments.devices, arguments.nodes, arguments.redundant)
    if arguments.apply:
        from moe_jax.training.rearrange import write_renumbered_run
        step = write_renumbered_run(workdir, pathlib.Path(arguments.apply).absolute(), placed.placement)
    placement.write_figure(out.with_suffix(".png"), placed)
    placement.write_placement(out, placed)
    print(placement.table(placed))
    print(f"written: {arguments.out}, {out.with_suffix('.png').name}")
    if arguments.apply:
        print(f"step {step} with its experts in this order: {arguments.apply}")
    return 0


def _report(arguments, overrides) -> int:
    del overrides
    from moe_jax.analysis.report import write_report
    from moe_jax.training.run import read_config
    workdir = pathlib.Path(arguments.workdir).absolute()
    read_config(workdir)
    print(write_report(workdir))
    return 0


def _plan(arguments, overrides) -> int:
    from moe_jax.planning.command import Request, check_request, run

    request = Request(
        name=pathlib.Path(arguments.config).stem, slice=arguments.slice, mesh=arguments.mesh, step=arguments.step,
        batch=arguments.batch, context=arguments.context, search=arguments.search, formula=arguments.formula,
        cache=not arguments.no_cache, json=arguments.json, out=arguments.out)
    check_request(request)
    return run(load_config(arguments.config, overrides), request)


if __name__ == "__main__":
    sys.exit(main())
