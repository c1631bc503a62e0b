"""Tables of analyses: checked columns, CSV, and what is said of records that lack something."""

import dataclasses

import numpy as np
import pytest
import records

from moe_jax.analysis.tables import Analysis, Headline, MissingArray, Table, latest, over_steps, to_csv


def test_a_table_becomes_csv():
    table = Table({"layer": np.array([1, 3]), "token": np.array(["a,b", 'say "x"']), "ratio": np.array([1 / 3, np.nan])}, "")
    assert to_csv(table) == 'layer,token,ratio\n1,"a,b",0.333333333\n3,"say ""x""",nan\n'
    assert len(table) == 2 and table.where(layer=3)["token"].tolist() == ['say "x"']


@pytest.mark.parametrize("columns", [{"a": [1, 2], "b": [1]}, {"a": [[1]]}])
def test_columns_are_equally_long_and_flat(columns):
    with pytest.raises(ValueError, match="equally long"):
        Table(columns, "")


def test_a_headline_reads_as_one_line():
    assert str(Headline("drops", 0.25, 0.1, 0.2, 0.3)) == "drops: 0.25 [0.2, 0.3], reference 0.1"
    assert str(Headline("drops", 0.25)) == str(Headline("drops", 0.25, None, np.nan, np.nan)) == "drops: 0.25"


def test_an_analysis_says_what_it_needs():
    with pytest.raises(ValueError, match="must be one of"):
        Analysis("a", "A", "", lambda records: None, lambda table: None, needs="luck")


def test_what_a_record_lacks_is_named():
    record = records.make(256, documents=4, domains_T=None, kept_LTK=None)
    with pytest.raises(MissingArray, match="no domains_T and no kept_LTK"):
        latest([record], "domains_T", "kept_LTK", "token_ids_T")
    with pytest.raises(MissingArray, match="no record"):
        latest([])


def test_records_over_training_are_of_the_same_tokens_in_order():
    first, other = records.make(256, documents=4, step=1), records.make(256, documents=4, step=2, seed=1)
    second = dataclasses.replace(first, step=2)
    assert over_steps([first, second])[0] is first
    wider = records.make(256, documents=4, step=3, choices=3, token_ids_T=first.token_ids_T)  # as where experts choose
    assert over_steps([first, wider])[1] is wider
    larger = records.make(256, documents=4, step=2, experts=9, token_ids_T=first.token_ids_T)
    for wrong, words in [([first], "two or more"), ([second, first], "ascending"), ([first, other], "same tokens"),
                         ([first, larger], "of 8 experts, and .* of 9")]:
        with pytest.raises(MissingArray, match=words):
            over_steps(wrong)
