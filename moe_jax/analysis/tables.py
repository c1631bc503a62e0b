"""What an analysis is, and what it returns.

An analysis is one function ``compute(records) -> Table``, one function ``draw(table) -> Figure`` and one line in
``catalogue.ANALYSES``. The table is tidy: equally long columns, one row per observation, so that it can be opened with
anything that reads CSV; the figure is drawn from the table alone.
"""

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from moe_jax.analysis.recording import RoutingRecord

# What an analysis reads: one record; one per saved step of the same tokens, in ascending order of their steps; or one of a
# pass in which experts had buffers, so that choices could be dropped.
NEEDS = ("record", "steps", "buffers")


class MissingArray(ValueError):
    """A record lacks what an analysis reads; the message is one line for people and says what to record."""


@dataclasses.dataclass(frozen=True)
class Headline:
    """One number that an analysis comes down to.

    Attributes:
      name: what it is, with its unit, in a few words.
      value: the number.
      reference: what routing without specialisation (or the named baseline) would give; None where there is none.
      low, high: ends of a 95 % interval by bootstrap over documents; None where it was not made (given as None or NaN).
    """

    name: str
    value: float
    reference: float | None = None
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.low is not None and np.isnan([self.low, self.high]).any():
            object.__setattr__(self, "low", None)
            object.__setattr__(self, "high", None)

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]"
        reference = "" if self.reference is None else f", reference {self.reference:.4g}"
        return f"{self.name}: {self.value:.4g}{interval}{reference}"


@dataclasses.dataclass(frozen=True)
class Table:
    """The result of an analysis.

    Attributes:
      columns: name -> NumPy array [rows]; numbers or text.
      caption: what is drawn, of how many tokens, what would count as specialisation, and the reference.
      headlines: the numbers that it comes down to; may be empty.
      facts: single values that the figure needs beside the columns (number of experts, names of tokens …).
    """

    columns: Mapping[str, np.ndarray]
    caption: str
    headlines: tuple[Headline, ...] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = {name: np.asarray(values) for name, values in self.columns.items()}
        shapes = {name: values.shape for name, values in columns.items()}
        if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) > 1:
            raise ValueError(f"The columns of a table are equally long and one-dimensional, not {shapes}")
        object.__setattr__(self, "columns", columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def where(self, **values: Any) -> dict[str, np.ndarray]:
        """The columns of those rows in which each named column has the given value."""
        chosen = np.ones(len(self), bool)
        for name, value in values.items():
            chosen &= self.columns[name] == value
        return {name: column[chosen] for name, column in self.columns.items()}


@dataclasses.dataclass(frozen=True)
class Analysis:
    """One line of the catalogue.

    Attributes:
      name: of its files, and how a command names it: lower case, with underscores.
      title: heading in the report.
      source: the paper and the figure or table that it reproduces.
      compute: records -> Table; raises MissingArray where a record lacks what it reads.
      draw: Table -> Matplotlib Figure.
      needs: "record": the newest record alone counts. "steps": two or more records of the same tokens. "buffers": the newest
        record, which should be of a dispatch with buffers; the report records such a pass beside a dropless one.
    """

    name: str
    title: str
    source: str
    compute: "Callable[[Sequence[RoutingRecord]], Table]"
    draw: Callable[[Table], Any]
    needs: str = "record"

    def __post_init__(self) -> None:
        if self.needs not in NEEDS:
            raise ValueError(f"needs={self.needs!r}: must be one of {NEEDS}")


def to_csv(table: Table) -> str:
    """The columns as CSV text, names in the first line; numbers with nine significant digits."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(zip(*(_cells(column) for column in table.columns.values())))
    return text.getvalue()


def _cells(column: np.ndarray) -> list[Any]:
    return [f"{value:.9g}" for value in column.tolist()] if column.dtype.kind == "f" else column.tolist()


def latest(records: "Sequence[RoutingRecord]", *arrays: str) -> "RoutingRecord":
    """The newest record, which must hold the named optional arrays.

    Raises:
      MissingArray: there is no record, or it lacks one of them.
    """
    if not records:
        raise MissingArray("There is no record of routing: make one with moe-jax analyze --checkpoint=…")
    lacking = [name for name in arrays if getattr(records[-1], name) is None]
    if lacking:
        raise MissingArray(f"The record holds no {' and no '.join(lacking)}; record the routing again from a source that has it")
    return records[-1]


def over_steps(records: "Sequence[RoutingRecord]") -> "Sequence[RoutingRecord]":
    """The records, checked to be of the same tokens in the same layers, at two or more steps in ascending order.

    Raises:
      MissingArray: they are not.
    """
    if len(records) < 2:
        raise MissingArray("Needs records of two or more steps; keep more checkpoints (training.checkpoint_every, "
                           "training.keep_checkpoints) and record each")
    steps = [record.step for record in records]
    if any(late <= early for early, late in zip(steps, steps[1:])):
        raise MissingArray(f"The records must be in ascending order of their steps, not {steps}")
    first = records[0]
    for record in records[1:]:
        if not np.array_equal(record.token_ids_T, first.token_ids_T):
            raise MissingArray(f"The records of steps {first.step} and {record.step} are not of the same tokens; record all "
                               f"steps with the same data and the same number of tokens")
        # K may differ: where experts choose, it is the most that any token has.
        if (record.layers, record.num_experts) != (first.layers, first.num_experts):
            raise MissingArray(f"The records of steps {first.step} and {record.step} are not of the same model: MoE layers "
                               f"{first.layers} of {first.num_experts} experts, and {record.layers} of {record.num_experts}")
    return records
