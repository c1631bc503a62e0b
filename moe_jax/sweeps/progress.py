"""How a sweep goes: a bar per running job on a terminal, one line per finished job elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from moe_jax.training.metrics import duration


class Display:
    """Progress over all jobs, counted in training steps: what is left is estimated from the steps done so far.

    Args:
      steps: of each job, by its name.
    """

    def __init__(self, steps: Mapping[str, int], stream: Any = None):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        self.steps = dict(steps)
        self.done: dict[str, int] = {}
        self.started = time.monotonic()
        self.console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._bars = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                              TextColumn("{task.fields[rest]}"), console=self.console, transient=True,
                              disable=not self.console.is_terminal)
        self._tasks: dict[str, Any] = {}
        self._all = self._bars.add_task("all steps", total=sum(self.steps.values()), rest="")

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bars.stop()

    def update(self, running: dict[str, int]) -> None:
        """``running``: steps done of each running job."""
        for name, steps in running.items():
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=self.steps[name], rest="")
            self._bars.update(self._tasks[name], completed=steps)
        total = sum(self.done.values()) + sum(running.values())
        self._bars.update(self._all, completed=total, rest=f"eta {self._eta(total)}")

    def finished(self, name: str, error: str | None) -> None:
        self.done[name] = self.steps[name]
        if name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))
        eta = self._eta(sum(self.done.values()))
        said = f"failed: {error}" if error else f"after {duration(time.monotonic() - self.started)}, eta {eta}"
        self.console.print(f"{len(self.done)}/{len(self.steps)}  {name}  {said}", markup=False)

    def _eta(self, steps: int) -> str:
        total = sum(self.steps.values())
        return duration((time.monotonic() - self.started) * (total - steps) / steps) if steps else "?"
