"""report.html of a run: one self-contained page that opens without a network, also for a run that was interrupted.

A file that is missing or damaged costs its sections, which say so; the rest is drawn. What is read: run_directory.py;
the figures: report_figures.py; the look of the page: report_page.py.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax import files
from moe_jax.analysis import report_figures as figures
from moe_jax.analysis.report_page import escape, figure_block, page, png_of, table_block
from moe_jax.analysis.run_directory import (
    Run,
    evaluation_layers,
    is_number,
    last_step,
    layer_series,
    load_records,
    ngram_baselines,
    read_run,
    series,
    training_layers,
)
from moe_jax.errors import UserError

# What a perfectly balanced router scores under each balance loss (routing/balance.py), for the reference line.
BALANCED = {
    "switch": lambda experts, choices: 1.0,
    "first_choice": lambda experts, choices: 1.0,
    "gshard": lambda experts, choices: 1.0 / experts**2,
    "st_moe": lambda experts, choices: float(choices),
}


# As nn/moe.py says it, which this module does not import: a report is drawn without JAX.
_WITHOUT_BUFFERS = ("dropless", "reference")


class ReportError(UserError, ValueError):
    """The report cannot be written; the message is one line for people."""


class Missing(Exception):
    """A section has nothing to show; the message says why."""


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `workdir`/report.html and returns its path; a previous report is replaced only by a complete one.

    Raises:
      ReportError: there is no such run directory, or the report cannot be written.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise ReportError(f"No run directory at {workdir}: give the workdir of a training run")
    path = workdir / "report.html"
    try:
        files.write_text(path, render(read_run(workdir)))
    except files.FileError as error:
        raise ReportError(f"{error} Or copy the run to a directory that you may write to and report there.") from error
    return path


def render(run: Run) -> str:
    """The page as text."""
    body, contents = [], []
    for title, section in SECTIONS:
        anchor = re.sub(r"\W+", "-", title.lower())
        try:
            inner = section(run)
        except Missing as reason:
            inner = f'<p class="missing">Not shown: {escape(reason)}.</p>'
        except Exception as error:  # one odd array must not cost the whole report
            inner = f'<p class="missing">Could not be drawn: {escape(f"{type(error).__name__}: {error}")}.</p>'
        contents.append(f'<a href="#{anchor}">{escape(title)}</a>')
        body.append(f'<section id="{anchor}"><h2>{escape(title)}</h2>{inner}</section>')
    return page(
        "Training report", run.workdir.resolve().name, _facts(run), _problems(run), _headline(run), contents, body
    )


# Headline.


def _facts(run: Run) -> list[str]:
    facts = []
    steps, planned = last_step(run), run.setting("training", "num_steps")
    if steps is not None:
        facts.append(f"step {steps:,} of {planned:,}" if planned else f"step {steps:,}")
    if tokens := _training_tokens(run):
        facts.append(tokens)
    if run.setting("moe", "num_experts"):
        layers, k = run.setting("model", "num_layers"), run.setting("moe", "experts_per_token")
        facts.append(f"{layers} layers, {run.num_experts} experts, {k} per token")
    if run.versions.get("device_kind"):
        facts.append(f"{run.versions.get('device_count', '?')} × {run.versions['device_kind']}")
    if run.versions.get("git_commit"):
        facts.append(f"commit {run.versions['git_commit'][:10]}")
    return facts


def _problems(run: Run) -> str:
    problems = list(run.problems)
    steps, planned = last_step(run), run.setting("training", "num_steps")
    if steps is not None and planned and steps < planned:
        problems.insert(0, f"The run stopped at step {steps:,} of {planned:,}; the same command continues it")
    items = "".join(f"<li>{escape(problem)}.</li>" for problem in problems)
    return f'<aside class="problems"><strong>Incomplete run</strong><ul>{items}</ul></aside>' if items else ""


def _headline(run: Run) -> str:
    result = run.evaluation
    if not is_number(result.get("ce")):
        return '<p class="verdict unknown">No validation result yet: the run has not been evaluated.</p>'
    cards = [("validation cross-entropy", f"{result['ce']:.3f}", "nats per token")]
    if is_number(result.get("bits_per_byte")):
        cards.append(("validation", f"{result['bits_per_byte']:.3f}", "bits per byte"))
    baselines = ngram_baselines(run)
    if "bigram" in baselines:
        cards.append(
            (
                "against a bigram model",
                f"{result['ce'] - baselines['bigram']['ce']:+.3f}".replace("-", "−"),
                "nats per token",
            )
        )
    _, speed = series(run, "train", "tokens_per_second")
    if len(speed):
        cards.append(("speed, median", f"{np.nanmedian(speed):,.0f}", "tokens per second"))
    tiles = "".join(
        f'<div class="card"><span>{escape(label)}</span><b>{escape(value)}</b><span>{escape(unit)}</span></div>'
        for label, value, unit in cards
    )
    rows = [("this model", result.get("ce"), result.get("bits_per_byte"))]
    causal = result.get("causal") or {}
    if is_number(causal.get("ce")):
        rows.append(("this model without seeing later tokens", causal["ce"], causal.get("bits_per_byte")))
    capacity = result.get("capacity") or {}
    if is_number(capacity.get("ce")):
        dropped = 100 * float(capacity.get("drop_fraction") or 0)
        label = f"this model at capacity factor {capacity.get('capacity_factor', '?')} ({dropped:.1f} % dropped)"
        rows.append((label, capacity["ce"], capacity.get("bits_per_byte")))
    rows += [(name, found["ce"], found.get("bits_per_byte")) for name, found in baselines.items()]
    table = table_block(
        ("", "nats per token", "bits per byte", "perplexity"),
        [(name, _digits(ce), _digits(bits), _digits(math.exp(min(ce, 50)), 2)) for name, ce, bits in rows],
        "numbers first",
    )
    dispatch = f", routed {result['dispatch']}" if result.get("dispatch") else ""
    caption = (
        f"Cross-entropy alone, no balancing terms{escape(dispatch)}. Step {escape(result.get('step', '?'))}, "
        f"{_count(result.get('tokens'))} held-out tokens of {_count(result.get('documents'))} documents. The n-gram "
        "models were counted on the same training text; lower is better."
    )
    return f'<div class="cards">{tiles}</div>{_verdict(result["ce"], baselines)}{table}<p class="caption">{caption}</p>'


def _verdict(ce: float, baselines: dict[str, dict]) -> str:
    if not baselines:
        return '<p class="verdict unknown">No n-gram baselines were recorded to compare with.</p>'
    beaten = [name for name, found in baselines.items() if ce < found["ce"]]
    kind = "good" if len(beaten) == len(baselines) else "bad" if not beaten else "mixed"
    best = min(baselines, key=lambda name: baselines[name]["ce"])
    gap = baselines[best]["ce"] - ce
    if kind == "good":
        others = [name for name in baselines if name != best]
        also = f" and the {' and '.join(others)} model" if others else ""
        text = (
            f"The model beats the {best} model{also}: {gap:.2f} nats per token below the {best}, "
            f"{100 * gap / baselines[best]['ce']:.0f} % less."
        )
    elif kind == "mixed":
        text = (
            f"The model beats the {' and '.join(beaten)} but not the {best} model: {-gap:.2f} nats per token above it."
        )
    else:
        text = f"The model does not beat any n-gram model yet: {-gap:.2f} nats per token above the {best} model."
    return f'<p class="verdict {kind}">{escape(text)}</p>'


# Sections.


def _loss(run: Run) -> str:
    train, evaluation = series(run, "train", "loss/ce"), series(run, "eval", "loss/ce")
    if not len(train[0]) and not len(evaluation[0]):
        raise Missing("metrics.jsonl has no loss/ce")
    balanced = BALANCED.get(str(run.setting("moe", "balance_loss")))
    reference = None
    if balanced and run.num_experts:
        reference = balanced(run.num_experts, run.setting("moe", "experts_per_token") or 1)
        cheap = run.num_zero_computation / run.num_experts
        reference *= 1 - cheap + cheap * (run.setting("moe", "zero_expert_weight") or 1)
    extra = {}
    for label, name, value in (("balance loss", "loss/balance", reference), ("router z-loss", "loss/router_z", None)):
        steps, values = series(run, "train", name)
        if len(steps):
            extra[label] = (steps, values, value)
    baselines = {name: found["ce"] for name, found in ngram_baselines(run).items()}
    tokens = _training_tokens(run) or "an unknown number of training tokens"
    if is_number(run.evaluation.get("tokens")):
        tokens += f"; {_count(run.evaluation['tokens'])} held-out tokens in the last evaluation"
    return _figure(
        figures.losses(train, evaluation, baselines, extra),
        f"{tokens}.",
        "Validation should fall below the dashed n-gram lines and stay close to training; where it turns up while "
        "training falls, the model is memorising.",
    )


def _load(run: Run) -> str:
    records = load_records(run)
    if not records:
        raise Missing("metrics.jsonl has no expert_load")
    steps = np.array([record["step"] for record in records])
    load_NLE = np.array([record["expert_load"] for record in records], dtype=float)
    layers = training_layers(run, load_NLE.shape[1])
    text = _figure(
        figures.load_over_training(steps, load_NLE, layers),
        _per_step(run),
        "White is the fair share, red an overloaded expert, blue a starved one; a row that stays dark blue is a dead "
        "expert, a map that fades to white is a router that learnt to balance.",
    )
    drop_steps, drop_NL, drop_layers = layer_series(run, "drop_fraction")
    max_steps, max_NL, _ = layer_series(run, "load_max")
    if not len(drop_steps) or len(drop_steps) != len(max_steps):
        return text
    return text + _figure(
        figures.balance_over_training(drop_steps, max_NL, drop_NL, drop_layers, _room(run)),
        _per_step(run),
        "Left: how much more than its share the busiest expert of a layer gets; above the dotted line its buffer is "
        "too small on average. Right: the choices that therefore found no room.",
    )


def _room(run: Run) -> float | None:
    """The load at which an expert's buffer is full, relative to the fair share; None without buffers."""
    factor = run.setting("moe", "capacity_factor")
    if not is_number(factor) or run.setting("moe", "dispatch") in _WITHOUT_BUFFERS:
        return None
    if run.setting("moe", "expert_capacity") or run.setting("moe", "capacity_counts") == "group":
        return None  # not in proportion to the fair share
    counts_tokens = run.setting("moe", "capacity_counts") == "tokens"  # then K choices share the room of one
    return factor / (run.setting("moe", "experts_per_token") or 1) if counts_tokens else factor


def _drops(run: Run) -> str:
    if "drop_rate_LS" not in run.routing:
        raise Missing("routing/evaluation.npz has no drop_rate_LS")
    dispatch = run.setting("moe", "dispatch")
    if dispatch in _WITHOUT_BUFFERS:
        raise Missing(f"the model was trained without buffers (moe.dispatch={dispatch}), so that nothing is dropped")
    rate_LS = run.routing["drop_rate_LS"]
    choices_S = run.routing.get("choices_at_position_S", np.ones(rate_LS.shape[1]))
    factor = run.setting("moe", "capacity_factor")
    return _figure(
        figures.drops_by_position(rate_LS, choices_S, evaluation_layers(run, len(rate_LS))),
        f"{int(np.sum(choices_S)):,} choices on held-out text, in all layers, under the training capacity"
        + (f" (factor {factor:g})." if is_number(factor) else "."),
        "Where buffers fill in the order of the sequence, drops gather towards its end; a flat line means that "
        "position does not decide who is dropped.",
    )


def _entropy(run: Run) -> str:
    steps, entropy_NL, layers = layer_series(run, "entropy")
    if not len(steps):
        raise Missing("metrics.jsonl has no moe/layer_*/entropy")
    return _figure(
        figures.entropy_over_training(steps, entropy_NL, layers, run.num_experts),
        _per_step(run),
        "At the dashed line the router spreads its probability evenly over all experts; towards 0 it is certain. "
        "A fall means that it is learning to choose, a plunge that it collapsed.",
    )


def _domains(run: Run) -> str:
    text = ""
    domains = run.evaluation.get("domains") or {}
    if domains:
        rows = [
            (name, _digits(found.get("ce")), _digits(found.get("bits_per_byte")), _count(found.get("tokens")))
            for name, found in domains.items()
        ]
        text = table_block(("domain", "nats per token", "bits per byte", "held-out tokens"), rows)
    if "domain_load_PLE" not in run.routing:
        if not text:
            raise Missing("routing/evaluation.npz has no domain_load_PLE")
        return text
    share_PLE = run.routing["domain_load_PLE"]
    names = [str(name) for name in run.routing.get("domains", range(len(share_PLE)))]
    return text + _figure(
        figures.domains_by_expert(share_PLE, names, evaluation_layers(run, share_PLE.shape[1])),
        f"{_count(run.evaluation.get('tokens'))} held-out tokens.",
        "Rows that look alike mean that experts do not care about the domain; a red cell is an expert that a domain "
        "seeks out, blue one that it avoids.",
    )


def _throughput(run: Run) -> str:
    steps, values = series(run, "train", "tokens_per_second")
    if not len(steps):
        raise Missing("metrics.jsonl has no tokens_per_second")
    caption = _training_tokens(run) or ""
    _, utilisation = series(run, "train", "mfu")
    if len(utilisation) and np.isfinite(utilisation).any():
        caption += f"; model FLOPs utilisation, median {100 * np.nanmedian(utilisation):.1f} %"
    _, waiting = series(run, "train", "data_wait_seconds")
    if len(waiting):
        caption += f"; wait for data, mean {1000 * np.nanmean(waiting):.1f} ms per step"
    return _figure(
        figures.throughput(steps, values),
        f"{caption}.",
        "A steady line is healthy; dips are evaluation, checkpoints or waiting.",
    )


def _samples(run: Run) -> str:
    if not run.samples:
        raise Missing("samples.json holds no samples")
    parts = []
    for sample in run.samples:
        prompt, text = str(sample.get("prompt", "")), str(sample.get("text", ""))
        rest = text.removeprefix(prompt)
        parts.append(f'<pre class="sample"><mark>{escape(prompt)}</mark>{escape(rest)}</pre>')
    return '<p class="caption">The marked beginning was given; the model wrote the rest.</p>' + "".join(parts)


def _config(run: Run) -> str:
    if not run.config:
        raise Missing("config.json is missing or empty")
    loose = {name: value for name, value in run.config.items() if not isinstance(value, dict)}
    groups = ({"run": loose} if loose else {}) | {n: v for n, v in run.config.items() if isinstance(v, dict)}
    tables = ""
    for name, values in groups.items():
        rows = [(key, _setting(value)) for key, value in values.items()]
        tables += f"<div><h3>{escape(name)}</h3>{table_block(None, rows, 'settings')}</div>"
    return f'<div class="groups">{tables}</div>'


def _setting(value: Any) -> str:
    """Text as it is, quoted where its ends would not be seen; everything else as JSON."""
    return value if isinstance(value, str) and value and value == value.strip() else json.dumps(value)


def _versions(run: Run) -> str:
    if not run.versions:
        raise Missing("versions.json is missing or empty")
    return table_block(None, [(name, "–" if value is None else value) for name, value in run.versions.items()], "settings")


SECTIONS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("Loss", _loss),
    ("Expert load", _load),
    ("Drops by position", _drops),
    ("Router entropy", _entropy),
    ("Domains and experts", _domains),
    ("Throughput", _throughput),
    ("Samples", _samples),
    ("Configuration", _config),
    ("Versions", _versions),
)


# Phrases.


def _training_tokens(run: Run) -> str:
    _, seen = series(run, "train", "tokens_seen")
    if len(seen) and np.isfinite(seen[-1]):
        return f"{int(seen[-1]):,} training tokens"
    steps, batch, length = last_step(run), run.setting("data", "batch_size"), run.setting("data", "sequence_length")
    return f"about {steps * batch * length:,} training tokens" if steps and batch and length else ""


def _per_step(run: Run) -> str:
    batch, length = run.setting("data", "batch_size"), run.setting("data", "sequence_length")
    each = f"up to {batch * length:,} tokens per step; " if batch and length else ""
    return f"Measured on training batches, {each}{_training_tokens(run) or 'number of tokens unknown'} in all."


# HTML.


def _figure(figure: Any, caption: str, how_to_read: str) -> str:
    text = f"{escape(caption)} <em>How to read it:</em> {escape(how_to_read)}"
    return figure_block(png_of(figure), how_to_read, text)


def _digits(value: Any, digits: int = 3) -> str:
    return f"{value:,.{digits}f}" if is_number(value) else "–"


def _count(value: Any) -> str:
    return f"{value:,.0f}" if is_number(value) else "an unknown number of"
