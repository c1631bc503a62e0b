"""What to change where a step does not fit into memory: the natural changes, the smallest first, tried by formula."""

import dataclasses
import math
from typing import Callable, Iterator

from moe_jax.config import Config, ConfigError
from moe_jax.planning.formulas import Estimate, estimate
from moe_jax.planning.meshes import legal_meshes
from moe_jax.planning.slices import Slice, larger_slices
from moe_jax.sharding import AXES, resolve_mesh

# A larger slice is worth naming up to so many times the chips.
_MOST_CHIPS = 64


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A change with which the step fits by formula.

    Attributes:
      settings: as one would write them: '--config.training.microbatches=4', '--mesh=fsdp=8,expert=8', '--slice=v5p-256'.
      why: what it does to memory, and what it costs.
      config, slice, sizes: with the change, to be estimated or compiled.
      estimate: of that.
    """

    settings: tuple[str, ...]
    why: str
    config: Config
    slice: Slice
    sizes: dict[str, int]
    estimate: Estimate


def suggestions(config: Config, slice_: Slice, sizes: dict[str, int], step: str = "train",
                correction: float = 1.0) -> Iterator[Suggestion]:
    """Changes with which the step fits by formula, the smallest first; nothing if the step fits as it is.

    One change on the same slice – recomputation, a mesh that shares more, more microbatches (fewer rows, for prefill and
    decoding) –, then two or all of them, then the next larger slice on which it fits, with as many of them as that takes.

    Args:
      correction: what the compiler needed over what the formula said, if the step was compiled: 1.2. Formulas of changes
        are multiplied with it.
    """
    room = slice_.hbm_bytes_per_device / correction

    def fitting(found):
        return found is not None and found.estimate.peak_bytes <= room

    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
    start = Suggestion((), "", config, slice_, dict(sizes), estimate(config, slice_, sizes, step))
    if fitting(start):
        return
    ways = [_rematerialised, _more_shares, _fewer_rows] if step == "train" else [_more_shares, _fewer_rows]
    for names in [(way,) for way in ways] + _pairs(ways) + ([tuple(ways)] if len(ways) > 2 else []):
        found = _after(start, names, step, room)
        if fitting(found) and len(found.settings) >= len(names):
            yield found
    for larger in larger_slices(slice_):
        if larger.chips > _MOST_CHIPS * slice_.chips:
            return
        on_larger = _on_slice(start, larger, step)
        if on_larger is None:
            continue
        found = on_larger
        for way in ways:
            if not fitting(found):
                found = way(found, step, room) or found  # a way may change nothing
        if fitting(found):
            yield found
            return


def _pairs(ways):
    return [(one, other) for number, one in enumerate(ways) for other in ways[number + 1:]]


def _after(start: Suggestion, ways: tuple[Callable, ...], step: str, room: float) -> Suggestion | None:
    """One way after the other; None where one of them changes nothing."""
    found = start
    for way in ways:
        found = way(found, step, room)
        if found is None:
            return None
    return found


def _changed(before: Suggestion, config: Config, sizes: dict[str, int], setting: str, why: str, step: str) -> Suggestion:
    same = setting.partition("=")[0] + "="
    settings = (*(each for each in before.settings if not each.startswith(same)), setting)
    return dataclasses.replace(before, settings=settings, why=" ".join(filter(None, (before.why, why))), config=config,
                               sizes=sizes, estimate=estimate(config, before.slice, sizes, step))


def _rematerialised(before, step, room):
    """Keeps only the input of every block of layers."""
    del room
    if before.config.model.remat == "block":
        return None
    config = dataclasses.replace(before.config, model=dataclasses.replace(before.config.model, remat="block"))
    return _changed(before, config, before.sizes, "--config.model.remat=block",
                    "Layers are computed again in the backward pass, a third more arithmetic.", step)


def _more_shares(before, step, room):
    """The legal mesh that is nearest to this one – fewest axes changed, then least sent – of those that fit; or, where none
    does, the one that needs least."""
    best = None
    for config in legal_meshes(before.config, before.slice.devices, before.slice.num_slices):
        sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
        guess = estimate(config, before.slice, sizes, step)
        if guess.peak_bytes >= before.estimate.peak_bytes:
            continue
        fits, sent = guess.peak_bytes <= room, sum(each.bytes * each.count for each in guess.collectives)
        distance = sum(sizes[axis] != before.sizes[axis] for axis in AXES)
        rank = (0, distance, sent) if fits else (1, guess.peak_bytes, sent)
        if best is None or rank < best[0]:
            best = rank, config, sizes
    if best is None:
        return None
    _, config, sizes = best
    words = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
    return _changed(before, config, sizes, f"--mesh={words}", "Parameters and optimizer state lie in more shares.", step)


def _fewer_rows(before, step, room):
    """The fewest microbatches that fit; of inference the most rows. Where none fits, as many, or few, as are legal."""
    config, found = before.config, None
    batch = config.data.batch_size
    for parts in (d for d in range(2, batch + 1) if batch % d == 0):
        if step == "train" and parts % config.training.microbatches:
            continue
        try:
            if step == "train":
                setting = f"--config.training.microbatches={parts}"
                changed = dataclasses.replace(config, training=dataclasses.replace(config.training, microbatches=parts))
            else:
                setting = f"--batch={batch // parts}"
                changed = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch // parts))
            resolve_mesh(changed, before.slice.devices)
        except ConfigError:
            continue
        if changed == config:
            continue
        why = "The batch goes through in more parts." if step == "train" else "Fewer rows at once."
        found = _changed(before, changed, before.sizes, setting, why, step)
        if found.estimate.peak_bytes <= room:
            return found
    return found


def _on_slice(before, larger, step):
    """The same axes but for ``data`` (and ``fsdp``, if that lets rows divide), which take the other chips."""
    for axis in ("fsdp", "data", "expert"):
        grown = dict(before.sizes)
        others = math.prod(size for name, size in grown.items() if name != axis)
        if larger.devices % others:
            continue
        grown[axis] = larger.devices // others
        config = dataclasses.replace(before.config, mesh=dataclasses.replace(before.config.mesh, **grown))
        try:
            resolve_mesh(config, larger.devices)
        except ConfigError:
            continue
        words = ",".join(f"{name}={size}" for name, size in grown.items() if size > 1)
        moved = dataclasses.replace(before, slice=larger)
        return dataclasses.replace(_changed(moved, config, grown, f"--slice={larger.name}", "More chips share it.", step),
                                   settings=(*before.settings, f"--slice={larger.name}", f"--mesh={words}"))
    return None
