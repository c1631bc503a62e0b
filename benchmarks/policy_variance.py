"""How noisy the gradient of a router trained by REINFORCE is, by its baseline. Prints JSON lines.

   python -m benchmarks.policy_variance                          # configs/openmoe_tiny.py
   python -m benchmarks.policy_variance --steps=200 --samples=64

One model (``moe.router=reinforce``, learned baseline) is trained; before the first step, and after the last one, the
gradient is taken again and again on one held-out batch, with new draws each time, under each baseline. What the fields
mean is written in benchmarks/README.md.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import tempfile

from benchmarks.command_line import parsed, parser_of
from moe_jax import environment

BASELINES = ("none", "running", "learned")


def main(argv: list[str] | None = None) -> int:
    arguments, overrides = parsed(_parser(), argv, steps=0, samples=2)
    environment.prepare_process(1)
    from moe_jax.config import load_config
    from moe_jax.errors import UserError

    try:
        config = load_config(arguments.config, ["--config.moe.router=reinforce", "--config.moe.experts_per_token=1",
                                                    *overrides])
        for line in measure(config, arguments.steps, arguments.samples):
            print(json.dumps(line), flush=True)
    except UserError as error:
        print(f"policy_variance: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("policy_variance", __doc__)
    parser.add_argument("--steps", type=int, default=200, help="training steps before the second measurement")
    parser.add_argument("--samples", type=int, default=64, help="gradients per baseline (default: %(default)s)")
    return parser


def measure(config, steps: int, samples: int):
    """Yields one dict per baseline, before training and after it."""
    import jax

    from moe_jax.routing.policy import uniform_guess, updated_running_mean
    from moe_jax.training.evaluate import put_batch
    from moe_jax.training.run import open_run
    from moe_jax.training.state import new_state
    from moe_jax.training.step import jitted_train_step

    with tempfile.TemporaryDirectory() as folder:
        run = open_run(config, pathlib.Path(folder))
        with jax.set_mesh(run.mesh):
            state = new_state(config, run.vocab_size, run.mesh)
            train = jitted_train_step(config, run.vocab_size)
            held_out = put_batch(run.data.train.batch(steps), run.mesh)
            sums_2 = jax.numpy.zeros(2)
            yield from _lines(config, run.vocab_size, state, held_out, uniform_guess(run.vocab_size), samples, 0)
            for step in range(steps):
                state, metrics = train(state, put_batch(run.data.train.batch(step), run.mesh))
                sums_2 = updated_running_mean(sums_2, metrics["sums"]["policy/reward"], metrics["tokens"],
                                              config.moe.policy_baseline_decay)
            if steps:
                yield from _lines(config, run.vocab_size, state, held_out, sums_2[0] / sums_2[1], samples, steps)


def _lines(config, vocab_size, state, batch, mean_reward, samples, steps):
    from moe_jax.routing.policy import uniform_guess

    levels = {"none": 0.0, "running": mean_reward, "learned": uniform_guess(vocab_size)}
    lines = [_line(config, name, vocab_size, state, batch, levels[name], samples) for name in BASELINES]
    for line in lines:
        yield {"steps": steps, **line, "ratio": line["router_variance"] / lines[0]["router_variance"]}


def _line(config, baseline, vocab_size, state, batch, level, samples):
    """Mean and variance of the gradient under one baseline, with the other losses' gradients left out."""
    import jax
    import jax.numpy as jnp

    params = state["params"] if baseline == "learned" else _without(state["params"], ("w_value_D", "b_value"))
    sample = _sampler(config, baseline, vocab_size)
    draws = [jax.device_get(sample(params, state["router_bias_LE"], batch, key, level))
             for key in jax.random.split(jax.random.key(1), samples)]
    router = jnp.stack([draw[0] for draw in draws])
    mean_of = lambda index: float(sum(draw[index] for draw in draws) / samples)
    variance = float(jnp.sum(jnp.var(router, axis=0, ddof=1)))
    # The squared norm of a mean of n draws is too large by variance / n.
    signal = float(jnp.sum(jnp.mean(router, axis=0) ** 2)) - variance / samples
    return {"baseline": baseline, "samples": samples, "reward": mean_of(1), "baseline_error": mean_of(2),
            "router_variance": variance, "squared_mean": signal}


@functools.lru_cache(maxsize=None)
def _sampler(config, baseline, vocab_size):
    """``(params, bias_LE, batch, key, level) ->`` the routers' gradient, the reward and the baseline's error, compiled."""
    import jax
    import jax.numpy as jnp

    from moe_jax.config import MoEConfig
    from moe_jax.training.step import gradients

    moe = dataclasses.replace(
        config.moe, policy_baseline=baseline, balance_weight=0.0, router_z_weight=0.0, policy_entropy_weight=0.0,
        policy_baseline_weight=MoEConfig.policy_baseline_weight, policy_baseline_decay=MoEConfig.policy_baseline_decay)
    config = dataclasses.replace(config, moe=moe)

    @jax.jit
    def sample(params, bias_LE, batch, key, level):
        grads, metrics = gradients(params, config, vocab_size, batch, bias_LE, key, level)
        router = [leaf.reshape(-1) for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
                  if path[-1].key == "w_router_DE"]
        return (jnp.concatenate(router), metrics["sums"]["policy/reward"],
                jnp.mean(metrics["routing"]["advantage_squared_L"]))

    return sample


def _without(tree, names):
    if isinstance(tree, dict):
        return {key: _without(value, names) for key, value in tree.items() if key not in names}
    return [_without(value, names) for value in tree] if isinstance(tree, list) else tree


if __name__ == "__main__":
    sys.exit(main())
