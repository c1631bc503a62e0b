"""Both variants of OpenMoE in the table of families, forward, against a model of NumPy written from the paper and the code.

The code: an FFN with two gates (four matrices) after the experts, with a norm of its own, and an output layer of its own. The
paper (eq. 4): MoE(x) + FFN(x) of one norm, three matrices, one table. Both: queries that are not scaled, rotary positions of
base 10,000 by halves, softmax over all experts and its two largest as they are, first choices before second ones in buffers
of round(factor · T / E) slots, at least four. Text is one document per row without padding here (with it:
tests/test_openmoe_oracles.py, on numbers that OpenMoE's own code computed)."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from moe_jax import families
from moe_jax.config import Config
from moe_jax.nn.moe import RoutingMode

SMALL = {"model": dict(num_layers=4, d_model=12, num_heads=3, num_kv_heads=3, head_dim=6, d_ff=10, vocab_size=tiny.VOCAB),
         "moe": dict(num_experts=4, d_ff=7, every=2, router_init=0.5), "data": dict(sequence_length=16, batch_size=3)}


def config_of(variant: str) -> Config:
    return families.resolve(families.merged(families.settings(f"openmoe_{variant}"), SMALL))


def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def swish(x):
    return x / (1 + np.exp(-x))


def rotated(x_SHd):
    half = x_SHd.shape[-1] // 2
    angle = np.arange(len(x_SHd))[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    first, second = x_SHd[..., :half], x_SHd[..., half:]
    return np.concatenate([first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], -1)


def attention(x_SD, w):
    query, key, value = (np.einsum("sd,dhk->shk", x_SD, w[f"w_{name}_DHd"]) for name in ("query", "key", "value"))
    scores_HST = np.einsum("shk,thk->hst", rotated(query), rotated(key))
    scores_HST[:, ~np.tri(len(x_SD), dtype=bool)] = -np.inf
    return np.einsum("hst,thk,hkd->sd", softmax(scores_HST), value, w["w_out_HdD"])


def network(x, w, letters=("DF", "FD"), expert=...):
    take = lambda branch, place: w[f"w_{branch}_{letters[place]}"][expert]
    hidden = swish(x @ take("gate", 0)) * (x @ take("in", 0))
    if f"w_linear_{letters[0]}" in w:
        hidden = hidden * (x @ take("linear", 0))
    return hidden @ take("out", 1)


def mixture(x_TD, w, factor):
    """Experts fill up with first choices, then with second ones; what finds no slot is left out. Also how many those are."""
    p_TE = softmax(x_TD @ w["w_router_DE"])
    experts = p_TE.shape[1]
    slots = max(round(factor * len(x_TD) / experts), 4)
    chosen_TK = np.argsort(-p_TE, axis=1, kind="stable")[:, :2]
    used, dropped, y_TD = [0] * experts, 0, np.zeros(x_TD.shape)
    for choice in range(2):
        for token, e in enumerate(chosen_TK[:, choice]):
            used[e] += 1
            if used[e] > slots:
                dropped += 1
                continue
            y_TD[token] += p_TE[token, e] * network(x_TD[token], w["experts"], ("EDF", "EFD"), e)
    return y_TD, dropped


def numpy_logits(variant, params, ids_BS, factor):
    """(logits [B, S, V], choices dropped); the tree of parameters is unrolled: two layers to a block."""
    table_VD = params["embedding"]["embedding_VD"]
    logits_BSV, dropped = [], 0
    for ids_S in ids_BS:
        x_SD = table_VD[ids_S]
        for number in range(4):
            w = jax.tree.map(lambda leaf: leaf[number // 2], params["body"]["layers"][number % 2])
            x_SD = x_SD + attention(norm(x_SD, w["attention_norm"]["scale_D"]), w["attention"])
            normed_SD = norm(x_SD, w["ffn_norm"]["scale_D"])
            if number % 2 == 0:
                x_SD = x_SD + network(normed_SD, w["mlp"])
                continue
            y_SD, more = mixture(normed_SD, w["moe"], factor)
            dropped += more
            if variant == "paper":
                x_SD = x_SD + y_SD + network(normed_SD, w["residual"])
            else:
                x_SD = x_SD + y_SD
                x_SD = x_SD + network(norm(x_SD, w["residual_norm"]["scale_D"]), w["residual"])
        x_SD = norm(x_SD, params["final_norm"]["scale_D"])
        # A tied table of rows of length sqrt(D) gives logits of size 1 when divided by that.
        logits_BSV.append(x_SD @ (params["embedding"]["w_logits_DV"] if variant == "code" else table_VD.T / np.sqrt(12)))
    return np.array(logits_BSV), dropped


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_the_forward_pass_is_the_numpy_models(variant):
    config, batch = config_of(variant), tiny.batch(rows=3)
    tree = tiny.params(config)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
    for mode, factor in ((RoutingMode.training(config), 1.25), (RoutingMode.evaluation(config), 2.0)):
        mode = dataclasses.replace(mode, noise=False)
        assert (mode.dispatch, mode.capacity_factor) == ("gather", factor)
        wanted, dropped = numpy_logits(variant, exact, batch["input_ids"], factor)
        np.testing.assert_allclose(tiny.logits(config, tree, batch, mode), wanted, rtol=2e-4, atol=2e-5)
        assert dropped > 0 or mode.capacity_factor == 2.0


def test_the_variants_differ_in_what_the_paper_and_the_code_say():
    paper, code = (tiny.leaves(tiny.params(config_of(variant))) for variant in ("paper", "code"))
    assert set(code) - set(paper) == {
        "embedding.w_logits_DV", "body.layers.0.mlp.w_linear_DF", "body.layers.1.residual.w_linear_DF",
        "body.layers.1.moe.experts.w_linear_EDF", "body.layers.1.residual_norm.scale_D"}
    assert set(paper) <= set(code)
