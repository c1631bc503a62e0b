"""A plan, or a search over meshes, as text for a terminal: aligned columns, units in the headings."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterable, Sequence

from moe_jax.planning.meshes import mesh_text
from moe_jax.planning.plan import BY_FORMULA, Exchange, Plan
from moe_jax.training.metrics import duration

GIB, MIB = 2**30, 2**20

# Rows of a search that are shown; JSON has all.
_MOST_ROWS = 12
_WIDTH = 110


def text_of(plan: Plan) -> str:
    """Everything about one plan; ends without a newline."""
    parts = [_heading(plan), _memory(plan), _exchanges(plan), _time(plan), _notes(plan)]
    return "\n\n".join(part for part in parts if part)


def count_text(count: float) -> str:
    """``46_702_792_704`` as ``'46.70 B'``."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:g}"


def seconds_text(seconds: float) -> str:
    if seconds >= 60:
        return duration(seconds)
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _long(seconds: float) -> str:
    return f"{seconds / 86400:.1f} days" if seconds > 2 * 86400 else duration(seconds)


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as columns, the first ``left`` aligned left, the others right."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    lines = (("  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))
             for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _heading(plan: Plan) -> str:
    slice_, chip = plan.slice, plan.slice.chip
    devices = f", {slice_.devices} devices" if slice_.devices != slice_.chips else ""
    slices = f"{slice_.num_slices} slices of " if slice_.num_slices > 1 else ""
    what = {"train": "one training step", "prefill": "prefill", "decode": "decoding one token per sequence"}[plan.step]
    length = f"of {plan.sequence_tokens:,} tokens"
    if plan.step == "decode":
        length = f"with a cache {length}"
    if plan.target_tokens:
        length = {"train": f"{length} and {plan.target_tokens:,} targets", "prefill": f"{length} for the encoder",
                  "decode": f"with a cache of {plan.target_tokens:,} tokens behind {plan.sequence_tokens:,} of the encoder"}[plan.step]
    heading = (f"{plan.name} on {slice_.name}: {what}\n"
               f"  {slice_.chips:,} chips {chip.name} ({slices}{slice_.topology}{devices}), mesh {mesh_text(plan.mesh)}\n"
               f"  {count_text(plan.parameters_total)} parameters, {count_text(plan.parameters_active)} active per token; "
               f"{plan.sequences:,} sequences {length}")
    return heading + ("\n" + _wrapped(f"chosen here, where the name says nothing: {' '.join(plan.chosen)}") if plan.chosen else "")


def _memory(plan: Plan) -> str:
    memory = plan.memory
    size, unit = (GIB, "GiB") if max(memory.peak_bytes, memory.formula_peak_bytes) >= GIB else (MIB, "MiB")
    amount = lambda count: f"{count / size:.2f}"
    rows = [(f"memory per chip, {unit}{_of_both_devices(plan)}", BY_FORMULA, "compiled")]
    rows += [(f"  {name}", amount(count), "") for name, count in memory.formula_bytes.items()]
    rows += [(f"  {name}", "", amount(count)) for name, count in memory.compiled_bytes.items()]
    rows.append(("  peak", amount(memory.formula_peak_bytes), amount(memory.peak_bytes)))
    if plan.basis == BY_FORMULA and memory.peak_bytes == memory.formula_peak_bytes:  # the compiler said nothing
        rows = [row[:2] for row in rows]
    verdict = (f"{memory.headroom_bytes / GIB:.1f} free, fits" if memory.fits else
               f"{-memory.headroom_bytes / GIB:.1f} too much: DOES NOT FIT")
    lines = [aligned(rows), f"  of {memory.available_bytes / GIB:.1f} GiB: {verdict}"]
    if memory.fits:
        return "\n".join(lines)
    if not plan.changes:
        lines.append("  no single change of settings known here makes it fit; take more chips, or try --search")
    for change in plan.changes:
        lines.append(_wrapped(f"would fit with {' '.join(change.settings)}: {change.peak_bytes / GIB:.1f} GiB, "
                              f"{change.basis}. {change.why}"))
    return "\n".join(lines)


def _of_both_devices(plan: Plan) -> str:
    devices = plan.slice.chip.devices_per_chip
    return f" ({devices} devices together)" if devices > 1 else ""


def _exchanges(plan: Plan) -> str:
    if not plan.exchanges:
        return "collectives: none"
    rows = [("collectives per step", "over", "data", "count", "MiB each", "GiB sent", "time", "beside computing")]
    certain = [each for each in plan.exchanges if not each.conditional]
    for row in merged(certain):
        rows.append((f"  {row.kind}", " x ".join(row.axes) or "-", row.dtype, f"{row.count:,}",
                     _amount(row.bytes_sent / MIB), _amount(row.bytes_sent * row.count / GIB), seconds_text(row.seconds),
                     "yes" if row.overlapped else "no"))
    lines = [aligned(rows, left=3)]
    if len(certain) < len(plan.exchanges):
        lines.append(_wrapped("and, where loads are skewed, further rounds of the exchange of rows (--json lists one), which no "
                              "figure here counts"))
    return "\n".join(lines)


def merged(exchanges: Iterable[Exchange]) -> list[Exchange]:
    """Those of one kind, axes, dtype and overlap as one, with the mean of their bytes; the longest first."""
    key = lambda e: (e.kind, e.axes, e.dtype, e.overlapped)
    rows = []
    for (kind, axes, dtype, overlapped), group in itertools.groupby(sorted(exchanges, key=key), key):
        group = list(group)
        count = sum(e.count for e in group)
        sent = sum(e.bytes_sent * e.count for e in group)
        rows.append(Exchange(kind, axes, dtype, "", "", round(sent / max(count, 1)), count,
                             sum(e.seconds for e in group), all(e.asynchronous for e in group), overlapped,
                             any(e.conditional for e in group)))
    return sorted(rows, key=lambda row: -row.seconds)


def _time(plan: Plan) -> str:
    time = plan.time
    flops = [("model", plan.model_flops), ("hardware", plan.hardware_flops)]
    if plan.compiled_flops is not None:
        flops.append(("as compiled", plan.compiled_flops))
    rows = [("time of a step, estimated", "")]
    rows += [(f"  {name}", seconds_text(seconds)) for name, seconds in time.parts_seconds.items()]
    rows.append(("  step", seconds_text(time.seconds)))
    lines = [aligned(rows), _wrapped(f"bound by {time.bound}; {time.basis}"),
             "  FLOPs per step: " + ", ".join(f"{count_text(count)} {name}" for name, count in flops)]
    result = [f"{plan.tokens_per_second:,.0f} tokens/s", f"MFU at most {100 * plan.mfu_upper_bound:.1f} %"]
    if plan.chip_hours is not None:
        result.append(f"{plan.chip_hours:,.0f} chip-hours for {plan.num_steps:,} steps "
                      f"({count_text(plan.num_steps * plan.tokens)} tokens, {_long(plan.num_steps * time.seconds)})")
    if plan.kv_cache_bytes:
        result.append(f"KV cache {_amount(plan.kv_cache_bytes / GIB)} GiB over all chips")
    lines.append(_wrapped("; ".join(result)))
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    """Lines of a readable width; a number stays with its unit."""
    joined = re.sub(r"(?<=\d) (?=(?:s|h|min|GiB|T|B|%|days)\b)", "\xa0", text)
    lines = textwrap.fill(joined, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return lines.replace("\xa0", " ")


def _notes(plan: Plan) -> str:
    seconds = ""
    if plan.compile_seconds is not None:
        seconds = f" Traced in {duration(plan.lower_seconds)}, compiled in {duration(plan.compile_seconds)}."
    known = [name for name in ("moe_jax", "jax", "libtpu") if plan.versions.get(name)]
    versions = ", ".join(f"{name} {plan.versions[name]}" for name in known)
    return _wrapped(f"{plan.basis}: {plan.why}{seconds}").strip() + f"\n{versions}"


def text_of_search(rows: Sequence[Plan], best: Plan | None) -> str:
    """A table over meshes, in the order given, ``best`` marked with an arrow."""
    cells = [("", "mesh", "basis", "GiB per chip", "", "step", "tokens/s", "MFU at most", "bound by")]
    for plan in rows[:_MOST_ROWS]:
        memory = plan.memory
        cells.append(("->" if plan is best else "", mesh_text(plan.mesh), plan.basis, _amount(memory.peak_bytes / GIB),
                      "fits" if memory.fits else "does not fit", seconds_text(plan.time.seconds),
                      f"{plan.tokens_per_second:,.0f}", f"{100 * plan.mfu_upper_bound:.1f} %", plan.time.bound))
    lines = [aligned(cells, left=3)]
    if len(rows) > _MOST_ROWS:
        lines.append(f"and {len(rows) - _MOST_ROWS} more meshes, slower or larger by formula (--json lists all)")
    if best is None:
        lines.append("none of these meshes fits; take more chips, or see what one of them lacks with --mesh=…")
    return "\n".join(lines)
