"""Which mesh? Every legal one by formula, the best few compiled."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from moe_jax.config import Config, ConfigError
from moe_jax.planning.meshes import legal_meshes, mesh_text
from moe_jax.planning.plan import Plan
from moe_jax.planning.slices import Slice

# The part of a chip's memory that a mesh chosen by formula may fill: formulas are sometimes a quarter too hopeful.
_ROOM = 0.8

# (config with its mesh, compile it?) -> its plan.
Planner = Callable[[Config, bool], Plan]


@dataclasses.dataclass(frozen=True)
class Found:
    """plans: one per mesh, the best first: compiled ones, then by formula. best: the fastest that fits; None: none does."""

    plans: tuple[Plan, ...]
    best: Plan | None


def rank(plan: Plan) -> tuple[bool, float, float]:
    """What fits before what does not; of what fits the faster first, then the smaller, of what does not the smaller."""
    order = (plan.time.seconds, plan.memory.peak_bytes)
    return (False, *order) if plan.memory.fits else (True, *reversed(order))


def search(config: Config, slice_: Slice, planner: Planner, compiled: int,
           say: Callable[[str, float | None], None] = lambda text, seconds_left: None) -> Found:
    """Plans every legal mesh by formula, then compiles the ``compiled`` best ones, one after another.

    Where none of these fits, up to as many again.

    Args:
      say: told what is done, and how many seconds everything will still take, as far as that is known.

    Raises:
      ConfigError: no mesh is legal.
    """
    candidates = legal_meshes(config, slice_.devices, slice_.num_slices)
    say(f"{len(candidates)} meshes by formula", None)
    by_formula = [(planner(candidate, False), candidate) for candidate in candidates]
    by_formula.sort(key=lambda found: rank(found[0]))
    tried, start = [], time.monotonic()
    for guess, candidate in by_formula:
        # The formulas may be too hopeful: where nothing that was compiled fits, as many again are tried.
        wanted = compiled if not tried or best_of(tried) else 2 * compiled
        if len(tried) >= wanted:
            break
        left = (time.monotonic() - start) / len(tried) * (wanted - len(tried)) if tried else None
        say(f"mesh {len(tried) + 1} of {min(wanted, len(by_formula))}: {mesh_text(guess.mesh)}", left)
        tried.append(planner(candidate, True))
    rest = [plan for plan, _ in by_formula[len(tried):]]
    return Found((*sorted(tried, key=rank), *rest), best_of(tried or rest))


def chosen_mesh(config: Config, slice_: Slice, planner: Planner, more_microbatches: bool) -> Config:
    """The config on a mesh that is chosen by formula: the fastest of those that leave room to what formulas miss, with as few
    microbatches as that takes; where none does, the fastest that fits, or lacks least.

    Args:
      more_microbatches: whether there may be more of them than the config has.

    Raises:
      ConfigError: no mesh is legal.
    """
    last = None
    for parts in (1, 2, 4, 8, 16, 32) if more_microbatches else (config.training.microbatches,):
        try:
            training = dataclasses.replace(config.training, microbatches=parts)
            candidates = legal_meshes(dataclasses.replace(config, training=training), slice_.devices, slice_.num_slices)
        except ConfigError:  # too few rows are left
            if last is None:
                raise
            break
        plans = sorted(((planner(candidate, False), candidate) for candidate in candidates), key=lambda pair: rank(pair[0]))
        roomy = [found for found in plans if found[0].memory.peak_bytes <= _ROOM * found[0].memory.available_bytes]
        if roomy:
            return roomy[0][1]
        if last is None or rank(plans[0][0]) < rank(last[0]):
            last = plans[0]
    return last[1]


def best_of(plans: Sequence[Plan]) -> Plan | None:
    fitting = [plan for plan in plans if plan.memory.fits]
    return min(fitting, key=rank, default=None)
