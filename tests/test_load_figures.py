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


def test_a_layer_with_dead_experts_is_on_the_page_wherever_it_is(several):
    dead = several[1].experts_LTK.copy()
    dead[0] %= 3  # five of eight experts of the first layer
    steps = [dataclasses.replace(record, experts_LTK=dead, step=step) for step, record in enumerate(several)]
    figure = load_figures.collapse_over_training(balance.collapse_over_training(steps))
    axis, = [axis for axis in figure.axes if axis.get_ylabel() == "dead experts"]
    assert axis.get_ylim()[1] > 5 and max(max(line.get_ydata()) for line in axis.lines) == 5


def test_each_burst_is_marked_as_long_as_it_is():
    # 12 batches of 256 tokens of one domain, 4 of the other.
    record = records.make(tokens=4096, documents=64, domains_T=((np.arange(4096) // 64) % 4 == 0).astype(int))
    table = balance.distribution_shift([record])
    figure = load_figures.distribution_shift(table)
    lengths = {name: int(((table["domain"] == name) & (table["phase"] == "burst")).sum()) for name in record.domains}
    assert lengths == {"domain 0": 4, "domain 1": 2}
    marked = {line.get_label(): len(line.get_markevery()) for line in figure.axes[0].lines if line.get_marker() == "o"}
    assert marked == {"burst of domain 0": 4, "burst of domain 1": 2}


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
