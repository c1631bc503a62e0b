"""A trained model evaluated without a part of it, as ``Evaluate`` of a sweep does: what is left out, and what is refused."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import tiny

from moe_jax.nn.moe import RoutingMode
from moe_jax.sweeps.definition import SweepError
from moe_jax.sweeps.model import TrainedModel, under_other_settings
from moe_jax.training.run import Run

SHARED = dict(moe_num_experts=4, moe_num_shared_experts=1, moe_experts_per_token=2)


def trained(config):
    run = Run(config, pathlib.Path("nowhere"), tiny.ONE, None, tiny.VOCAB)
    return TrainedModel("arm", 0, run, config, tiny.params(config), tiny.no_bias(config), 0, [], RoutingMode.evaluation(config))


def test_without_its_shared_expert_a_model_computes_what_it_does_when_that_expert_gives_nothing():
    config, without = tiny.config(**SHARED), tiny.config(**{**SHARED, "moe_num_shared_experts": 0, "moe_experts_per_token": 3})
    model = trained(config)
    silent = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if "shared" in jax.tree_util.keystr(path) else leaf, model.params)
    batch = tiny.batch()
    removed = under_other_settings(model, "removed", without, causal=False)
    assert "shared" not in removed.params["body"]["layers"][1]["moe"] and "shared" in model.params["body"]["layers"][1]["moe"]
    found = tiny.logits(without, removed.params, batch)
    three = dataclasses.replace(config, moe=dataclasses.replace(config.moe, experts_per_token=3))
    np.testing.assert_allclose(found, tiny.logits(three, silent, batch), rtol=1e-5, atol=1e-5)
    assert np.abs(found - tiny.logits(config, model.params, batch)).max() > 1e-2


def test_parts_that_were_never_trained_or_have_another_shape_are_refused():
    model = trained(tiny.config(**{**SHARED, "moe_num_shared_experts": 0}))
    with pytest.raises(SweepError, match="arm 'more': its settings want the parameter body/layers/1/moe/shared, which the trained model does not"):
        under_other_settings(model, "more", tiny.config(**SHARED), causal=False)
    with pytest.raises(SweepError, match=r"arm 'wide': .*experts/.* as \(2, 4, 16, 32\), the trained model has \(2, 4, 16, 16\)"):
        under_other_settings(model, "wide", tiny.config(**{**SHARED, "moe_num_shared_experts": 0, "moe_d_ff": 32}), causal=False)
