"""Pictures of a plan: memory by part against what a chip has, time by part; of a search, both over meshes."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from moe_jax import files
from moe_jax.analysis.report_figures import ACCENT, EVALUATION, INK, MUTED, TRAIN, new_figure, plain
from moe_jax.planning.meshes import mesh_text
from moe_jax.planning.plan import BY_FORMULA, COMPILED, Plan
from moe_jax.planning.plan_table import GIB, seconds_text

_COLOURS = ("#3e7cb1", "#8fb8de", "#2a9d8f", "#e9c46a", "#c8553d", "#9aa5b1", "#6d597a", "#b5838d", "#52606d",
            "#90a955")


def plan_figure(plan: Plan) -> Any:
    """Two panels: bytes of one chip in parts, by formula and as compiled, with a line at what it has; seconds by part."""
    figure, axes = new_figure(3.6, 1, 2, width_ratios=[1.25, 1])
    figure.suptitle(plain(f"{plan.name}, {plan.step}, {plan.slice.name} ({plan.slice.chips} chips {plan.slice.chip.name}), "
                          f"mesh {mesh_text(plan.mesh)}"), fontsize=10.5, color=INK, x=0.01, ha="left")
    _draw_memory(axes[0, 0], plan)
    _draw_time(axes[0, 1], plan)
    return figure


def _draw_memory(axis: Any, plan: Plan) -> None:
    memory = plan.memory
    bars = [(BY_FORMULA, memory.formula_bytes)] + [(COMPILED, memory.compiled_bytes)] * bool(memory.compiled_bytes)
    shown = 0
    for row, (label, parts) in enumerate(bars):
        left = 0.0
        for name, count in parts.items():
            if count < 0.002 * memory.peak_bytes:  # could not be seen; the table has it
                continue
            axis.barh(row, count / GIB, left=left, height=0.55, color=_COLOURS[shown % len(_COLOURS)],
                      label=plain(name))
            left, shown = left + count / GIB, shown + 1
        axis.text(left, row, f" {left:.1f}", va="center", fontsize=9, color=INK)
    available = memory.available_bytes / GIB
    axis.axvline(available, color=EVALUATION, linestyle=(0, (5, 3)), linewidth=1.3, label=f"a chip has {available:.1f}")
    axis.set_yticks(range(len(bars)), [label for label, _ in bars])
    axis.set_ylim(1.6, -0.6)  # one bar is no thicker than two
    axis.set(xlabel="memory per chip (GiB)")
    axis.set_xlim(0, 1.12 * max(available, *(sum(parts.values()) / GIB for _, parts in bars)))
    axis.grid(axis="y", visible=False)
    axis.legend(fontsize=7.5, frameon=False, labelcolor=INK, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _draw_time(axis: Any, plan: Plan) -> None:
    parts = {**plan.time.parts_seconds, "step": plan.time.seconds}
    scale, unit = (1.0, "s") if plan.time.seconds >= 1 else (1e3, "ms")
    colours = [ACCENT if name == "step" else TRAIN for name in parts]
    axis.barh(range(len(parts)), [scale * seconds for seconds in parts.values()], height=0.6, color=colours)
    for row, seconds in enumerate(parts.values()):
        axis.text(scale * seconds, row, f" {seconds_text(seconds)}", va="center", fontsize=8.5, color=INK)
    axis.set_yticks(range(len(parts)), [plain(name) for name in parts])
    axis.invert_yaxis()
    axis.set(xlabel=f"estimated time of a step ({unit})")
    axis.set_xlim(0, 1.3 * scale * max(parts.values()))
    axis.grid(axis="y", visible=False)


def search_figure(plans: Sequence[Plan], best: Plan | None) -> Any:
    """Two panels over the same meshes: step time and memory; what does not fit is grey, the best one green."""
    figure, axes = new_figure(1.4 + 0.32 * len(plans), 1, 2, sharey=True)
    first = plans[0]
    figure.suptitle(plain(f"{first.name}, {first.step}, {first.slice.name} ({first.slice.chips} chips "
                          f"{first.slice.chip.name}); green: the best, grey: does not fit"), fontsize=10.5, color=INK,
                    x=0.01, ha="left")
    scale, unit = (1.0, "s") if max(plan.time.seconds for plan in plans) >= 1 else (1e3, "ms")
    colours = [ACCENT if plan is best else TRAIN if plan.memory.fits else MUTED for plan in plans]
    rows, (left, right) = range(len(plans)), axes[0]
    left.barh(rows, [scale * plan.time.seconds for plan in plans], height=0.65, color=colours)
    right.barh(rows, [plan.memory.peak_bytes / GIB for plan in plans], height=0.65, color=colours)
    available = first.memory.available_bytes / GIB
    right.axvline(available, color=EVALUATION, linestyle=(0, (5, 3)), linewidth=1.3, label=f"a chip has {available:.1f}")
    right.legend(fontsize=8.5, frameon=False, labelcolor=INK)
    left.set_yticks(rows, [plain(f"{mesh_text(plan.mesh)} ({plan.basis})") for plan in plans])
    left.invert_yaxis()
    left.set(xlabel=f"estimated time of a step ({unit})")
    right.set(xlabel="peak memory per chip (GiB)")
    for axis in (left, right):
        axis.grid(axis="y", visible=False)
        axis.set_xlim(left=0)
    return figure


def write_figure(figure: Any, path: pathlib.Path) -> None:
    """Writes a PNG, whole or not at all. Raises FileError."""
    with files.whole(path) as file:
        figure.savefig(file, format="png")
