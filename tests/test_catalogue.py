"""Every analysis of the catalogue: what it draws can be read, whatever the record holds, and its table is all that it needs."""

import dataclasses
import re
import warnings

import numpy as np
import pytest
import records

from moe_jax.analysis.catalogue import ANALYSES
from moe_jax.analysis.tables import MissingArray, to_csv


def complete(record, **fields):
    """The record at two steps with all arrays that an analysis could ask for."""
    layers, tokens, choices = record.experts_LTK.shape
    random = np.random.default_rng(0)
    scores = {name: random.random((layers, tokens)).astype(np.float32) for name in ("entropy_LT", "logit_norm_LT", "confidence_LT")}
    following = np.concatenate([record.experts_LTK[1:], np.full_like(record.experts_LTK[:1], -1)])
    last = dataclasses.replace(record, **scores, next_experts_LTK=following, dispatch="gather", capacity_factor=1.0, **fields)
    return [dataclasses.replace(last, step=50), last]


WORDS = tuple(["$x_1$", "\n", " the", "ﷺ", "if", "", "1", "<start>", "é" * 40, ")"] * 9)


def usual():
    record = records.make(tokens=4096, documents=128, by="token", domains=3, turns=3, vocabulary=90, token_texts=WORDS, layers=2)
    return complete(record, kept_LTK=records.places_run_out(record, 34))


def many():
    return complete(records.make(tokens=4096, layers=4, experts=64, choices=4, domains=30, documents=128, turns=12, vocabulary=90,
                                 token_texts=WORDS))


def few():
    """One layer, one choice, which some tokens do not make; an expert that nobody chooses; nothing but tokens is known."""
    experts_LTK = np.where(np.arange(1024)[None, :, None] % 5 == 0, -1, records.make(1024, layers=1, choices=1, experts=3).experts_LTK)
    plain = records.make(1024, layers=1, choices=1, documents=8, experts=4, experts_LTK=experts_LTK, kept_LTK=None)
    return complete(plain)


def bare():
    """Nothing but token ids and experts."""
    full = records.make(tokens=1024, documents=8)
    optional = [field.name for field in dataclasses.fields(full) if field.default is None]
    return [dataclasses.replace(full, step=step, domains=(), token_texts=(), **dict.fromkeys(optional)) for step in (1, 2)]


@pytest.fixture(scope="module", params=[usual, many, few, bare], ids=lambda make: make.__name__)
def some_records(request):
    return request.param.__name__, request.param()


@pytest.mark.parametrize("analysis", ANALYSES, ids=lambda analysis: analysis.name)
def test_every_analysis_works_on_every_kind_of_record_or_says_what_is_missing(analysis, some_records):
    kind, found = some_records
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        try:
            table = analysis.compute(found if analysis.needs == "steps" else found[-1:])
        except MissingArray as problem:
            # Thirty domains of 4,096 tokens are too small for a burst of one.
            assert (kind in ("few", "bare") or analysis.name == "distribution_shift") and "\n" not in str(problem) and str(problem)[0].isupper()
            return
        figure = analysis.draw(table)
        figure.draw_without_rendering()
    assert len(table) and len(to_csv(table).splitlines()) >= 1 + len(table)
    assert re.search(r"\d tokens|\d+ pairs|tokens", table.caption) and re.search(r"\d", table.caption)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert any(axis.get_xlabel() for axis in shown) and any(axis.get_ylabel() or axis.get_yticklabels() for axis in shown)
    width, height = figure.get_size_inches()
    assert width < 12 and height < 24
    for line in table.headlines:
        assert np.isfinite(line.value), line
