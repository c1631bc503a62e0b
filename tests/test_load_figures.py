"""The figures of balance, prediction and caches: units on every axis, the reference, numbers of tokens, finite values drawn."""

import dataclasses

import numpy as np
import pytest
import records
from matplotlib.backends.backend_agg import FigureCanvasAgg

from moe_jax.analysis import balance, cache, load_figures, prediction
from moe_jax.analysis.tables import MissingArray

FIGURES = {
    "balance": (balance, "random choice"), "expert_loads": (balance, "fair share"),
    "balance_by_position": (balance, "random choice"), "distribution_shift": (balance, "random choice"),
    "router_confidence": (balance, "no preference"), "collapse_over_training": (balance, "no preference"),
    "expert_prediction": (prediction, "at random"), "token_overlap": (prediction, "k²/E"), "expert_cache": (cache, "n/E"),
}


def recorded(layers, experts, choices, documents=64, tokens=4096):
    """A record with all that the figures read, at two steps."""
    record = records.make(tokens=tokens, layers=layers, experts=experts, choices=choices, documents=documents)
    random_LT = np.random.default_rng(0).random((layers, tokens)).astype(np.float32)
    next_LTK = np.concatenate([record.experts_LTK[1:], np.full((1, tokens, choices), -1)])
    record = dataclasses.replace(record, confidence_LT=random_LT, entropy_LT=random_LT, logit_norm_LT=random_LT,
                                 next_experts_LTK=next_LTK)
    return [record, dataclasses.replace(record, step=200)]


@pytest.fixture(scope="module")
def several():
    return recorded(layers=3, experts=8, choices=2)


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_has_a_label_and_the_reference_is_drawn(name, several, monkeypatch):
    monkeypatch.setattr(cache, "LAYER_VISITS", 200)
    module, reference = FIGURES[name]
    table = getattr(module, name)(several)
    assert any(f"{tokens:,}" in table.caption for tokens in (4096, 4032, 2016, 66))  # all, pairs, half of them, simulated
    figure = getattr(load_figures, name)(table)
    FigureCanvasAgg(figure).draw()
    for axis in figure.axes:
        if axis.get_visible():
            assert axis.get_ylabel() and (axis.get_xlabel() or axis.get_subplotspec().rowspan.start == 0)
    lines = [line for axis in figure.axes for line in axis.lines]
    assert any(reference in str(line.get_label()) for line in lines)
    assert all(np.isfinite(np.asarray(line.get_ydata(), float)).all() for line in lines)


@pytest.mark.parametrize("layers, experts, choices, documents", [(1, 8, 2, 64), (2, 4, 4, 64), (2, 8, 1, 1), (18, 16, 2, 16)])
def test_unusual_sizes_are_drawn(layers, experts, choices, documents, monkeypatch):
    monkeypatch.setattr(cache, "LAYER_VISITS", 200)
    steps = recorded(layers, experts, choices, documents)
    for name, (module, _) in FIGURES.items():
        # Prediction needs a layer before and documents to learn from.
        if module is not balance and name != "token_overlap" and (layers == 1 or documents == 1):
            with pytest.raises(MissingArray):
                getattr(module, name)(steps)
        elif name == "distribution_shift" and documents == 1:
            with pytest.raises(MissingArray, match="two domains; the record has domain 0 alone"):
                balance.distribution_shift(steps)
        else:
            FigureCanvasAgg(getattr(load_figures, name)(getattr(module, name)(steps))).draw()
