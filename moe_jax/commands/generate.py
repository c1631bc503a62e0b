"""``moe-jax generate``."""

import math

from moe_jax.commands.open_run import opened_params
from moe_jax.commands.parsers import CommandError, add_command, add_devices, add_placement, add_workdir


def add(commands) -> None:
    generate = add_command(commands, "generate", run, "Sample text from a run's newest checkpoint.")
    add_workdir(generate)
    add_devices(generate)
    generate.add_argument("--prompt", action="append",
                          help="text to continue; may be given several times (default: the empty text)")
    generate.add_argument("--max-tokens", type=int, default=200, help="tokens to add (default: %(default)s)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 = greedy (default: %(default)s)")
    generate.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens only; 0 = all "
                          "(default: %(default)s)")
    generate.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this total "
                          "probability (default: %(default)s)")
    generate.add_argument("--seed", type=int, default=0, help="another seed, another sample (default: %(default)s)")
    add_placement(generate)


def run(arguments, overrides) -> int:
    del overrides
    from moe_jax.inference.generate import Sampling, generate_texts
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
    trained, params, bias_LE, step, _ = opened_params(arguments)
    vocabulary = trained.data.vocabulary
    prompts = arguments.prompt or [""]
    texts = generate_texts(params, trained.config, trained.vocab_size, vocabulary, prompts, arguments.max_tokens, sampling,
                           arguments.seed, bias_LE)
    for prompt, text in zip(prompts, texts) if processes.index() == 0 else ():
        # An encoder–decoder's sample does not go on where the prompt ends.
        between = "\n-> " if trained.config.model.encoder_layers else ""
        print(f"--- step {step}\n{prompt}{between}{text}")
    return 0
