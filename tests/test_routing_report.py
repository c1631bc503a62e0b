"""The report on recorded routing: its files, a page that needs nothing else, and what is missing named."""

import csv
import dataclasses
import os
import re

import numpy as np
import pytest
import records

from moe_jax.analysis.catalogue import ANALYSES
from moe_jax.analysis.report_figures import new_figure
from moe_jax.analysis.routing_report import RoutingReportError, check_out, run_analyses, summary, write_report
from moe_jax.analysis.tables import Analysis, Headline, MissingArray, Table

RECORD = records.make(tokens=512, documents=16, data="made-up text", dispatch="dropless")


def compute(found):
    """The first tokens and their experts."""
    record = found[-1]
    return Table({"token": record.token_ids_T[:3], "share": np.array([0.5, np.nan, 1 / 3]), "name": np.array(["a", "b", "c,d"])},
                 f"What is drawn, of {record.num_tokens} <tokens>.", (Headline("share", 0.5, 0.25, 0.4, 0.6), Headline("x", 1)),)


def draw(table):
    figure, axes = new_figure(2.0)
    axes[0, 0].plot(table["token"], table["share"])
    return figure


def impossible(found):
    raise MissingArray("The record holds no turns")


def faulty(found):
    return 1 / 0


GOOD = Analysis("good_one", "A good one", "Paper, figure 1", compute, draw)
LACKING = Analysis("no_turns", "Turns", "Paper, figure 2", impossible, draw)
FAULTY = Analysis("faulty", "Faulty", "Paper, figure 3", faulty, draw)


def test_each_analysis_becomes_a_table_and_a_picture(tmp_path):
    (outcome,) = write_report([RECORD], tmp_path / "new" / "report", "my run", analyses=[GOOD])
    folder = tmp_path / "new" / "report"
    assert sorted(os.listdir(folder)) == ["good_one.csv", "good_one.png", "report.html", "tables.npz"]
    with (folder / "good_one.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["token", "share", "name"] and rows[3] == [str(RECORD.token_ids_T[2]), "0.333333333", "c,d"]
    assert (folder / "good_one.png").read_bytes() == outcome.png and outcome.png.startswith(b"\x89PNG")
    with np.load(folder / "tables.npz") as tables:
        np.testing.assert_array_equal(tables["good_one/token"], RECORD.token_ids_T[:3])
        assert tables["good_one/name"].tolist() == ["a", "b", "c,d"]


def test_the_page_needs_no_other_file_and_says_what_is_not_possible(tmp_path):
    outcomes = write_report([RECORD], tmp_path, "my <run>", analyses=[GOOD, LACKING])
    text = (tmp_path / "report.html").read_text()
    assert "http" not in re.sub(r'src="data:image/png;base64,[^"]*"', "", text) and "<script" not in text and "<link" not in text
    assert re.findall(r'<img[^>]*src="(data:image/png;base64,)', text) == ["data:image/png;base64,"]
    for part in ("my &lt;run&gt;", "512 tokens of made-up text", "16 documents", "dispatch dropless", "Paper, figure 1",
                 "of 512 &lt;tokens&gt;", "0.4 – 0.6", "0.25", "Not possible", "The record holds no turns", "Paper, figure 2"):
        assert part in text, part
    assert [outcome.failed for outcome in outcomes] == [False, False]
    found = summary([RECORD], outcomes, tmp_path)
    assert found["analyses"]["good_one"]["headlines"][0]["value"] == 0.5 and list(found["not_possible"]) == ["no_turns"]


def test_a_faulty_analysis_costs_no_other_and_is_not_hidden(tmp_path):
    outcomes = write_report([RECORD], tmp_path, analyses=[FAULTY, GOOD])
    assert [outcome.failed for outcome in outcomes] == [True, False]
    assert "ZeroDivisionError" in (tmp_path / "report.html").read_text() and (tmp_path / "good_one.png").exists()


def test_tables_of_an_earlier_report_that_are_no_longer_possible_go(tmp_path):
    write_report([RECORD], tmp_path, analyses=[dataclasses.replace(LACKING, compute=compute)])
    assert (tmp_path / "no_turns.csv").exists()
    write_report([RECORD], tmp_path, analyses=[LACKING])
    assert sorted(os.listdir(tmp_path)) == ["report.html", "tables.npz"]


def test_drops_are_read_from_the_record_that_was_made_for_them():
    dispatch = lambda found: Table({"dispatch": np.array([record.dispatch for record in found])}, "caption")
    drawn = lambda table: new_figure(1.0)[0]
    buffered = dataclasses.replace(RECORD, dispatch="gather", capacity_factor=1.25)
    analyses = [Analysis("a", "A", "B", dispatch, drawn), Analysis("b", "B", "B", dispatch, drawn, needs="buffers")]
    read = lambda **options: [outcome.table["dispatch"].tolist() for outcome in run_analyses([RECORD], analyses, **options)]
    assert read(drops=buffered) == [["dropless"], ["gather"]] and read() == [["dropless"], ["dropless"]]


def test_places_without_a_report_are_refused_and_nothing_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RoutingReportError, match="is a file"):
        write_report([RECORD], tmp_path / "file", analyses=[GOOD])
    with pytest.raises(RoutingReportError, match="file is not a folder"):
        check_out(tmp_path / "file" / "report")
    with pytest.raises(MissingArray, match="no record"):
        write_report([], tmp_path / "report", analyses=[GOOD])
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(RoutingReportError, match="may not be written to"):
        write_report([RECORD], tmp_path / "report", analyses=[GOOD])
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_every_analysis_of_the_catalogue_has_a_name_of_its_own():
    names = [analysis.name for analysis in ANALYSES]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)
