"""What a model writes behind prompts of unequal lengths, token by token, beside its forward pass over the whole text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from moe_jax.inference.generate import decode, prefill
from moe_jax.sharding import TOKEN_AXES

PROMPTS, STEPS = [9, 5, 1, 8], 7


@functools.lru_cache(maxsize=None)
def continued(config):
    """Logits of the token after the prompts, and after each of STEPS given tokens, ``[STEPS + 1, B, V]``."""
    def run(params, ids_BS, valid_BS, given_BT):
        bias_LE = tiny.no_bias(config)
        first_BV, written = prefill(params, ids_BS, valid_BS, bias_LE, config, tiny.VOCAB, ids_BS.shape[1] + STEPS)

        def step(written, given):
            i, token_B = given
            logits_BV, written = decode(params, written, jax.reshard(token_B, jax.P(TOKEN_AXES)), ids_BS.shape[1] + i, bias_LE,
                                        config, tiny.VOCAB)
            return written, logits_BV

        _, more_TBV = jax.lax.scan(step, written, (jnp.arange(STEPS), given_BT.T))
        return jnp.concatenate([first_BV[None], more_TBV])

    return jax.jit(run, compiler_options=tiny.QUICK)


def by_steps_and_at_once(config, params, mesh=tiny.ONE):
    """The logits of both ways, ``[STEPS + 1, B, V]``. Prompts of unequal lengths, some longer than windows and chunks."""
    batch, width = tiny.batch(rows=4, length=16, lengths=[n + STEPS for n in PROMPTS]), max(PROMPTS)
    ids_BS, whole_BSV = batch["input_ids"], tiny.logits(config, params, batch)
    prompt_BS = np.array([[11] * (width - n) + list(ids_BS[b, :n]) for b, n in enumerate(PROMPTS)], np.int32)
    valid_BS = np.array([[False] * (width - n) + [True] * n for n in PROMPTS])
    given_BT = np.array([ids_BS[b, n : n + STEPS] for b, n in enumerate(PROMPTS)])
    with jax.set_mesh(mesh):
        found = jax.device_get(continued(config)(tiny.placed(params, mesh), prompt_BS, valid_BS, given_BT))
    wanted = np.stack([[whole_BSV[b, n - 1 + i] for b, n in enumerate(PROMPTS)] for i in range(STEPS + 1)])
    return found, wanted
