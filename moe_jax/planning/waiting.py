"""What is being waited for, on stderr, while a compiler that says nothing runs for minutes."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from moe_jax.training.metrics import duration

# Seconds between two signs of life: on a terminal, where the line is written over, and in a log.
_TERMINAL_EVERY, _LOG_EVERY = 1.0, 15.0


class Waiting:
    """``with Waiting() as waiting: waiting.say("Compiling …"); …``: the text with the seconds since, again and again.

    On a terminal one line that is written over and cleared in the end, elsewhere a line at once and one every 15 s.

    Args:
      stream: where to write; stderr by default.
      every: seconds between signs of life, if not those.
    """

    def __init__(self, stream: Any = None, every: float | None = None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._every = every or (_TERMINAL_EVERY if self._terminal else _LOG_EVERY)
        self._text, self._since, self._left = "", 0.0, None
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="waiting", daemon=True)

    def __enter__(self) -> Waiting:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        if self._terminal:
            print("\r\x1b[K", end="", file=self._stream, flush=True)

    def say(self, text: str, seconds_left: float | None = None) -> None:
        """What is waited for from now on; ``seconds_left``: how long everything will take, for an eta."""
        with self._lock:
            now = time.monotonic()
            self._text, self._since = text, now
            self._left = None if seconds_left is None else now + seconds_left
            self._show(first=True)

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            with self._lock:
                self._show()

    def _show(self, first: bool = False) -> None:
        if not self._text or self._ended.is_set():
            return
        now = time.monotonic()
        text = self._text if first else f"{self._text}  {duration(now - self._since)}"
        if self._left is not None:
            text += f", eta {duration(max(0.0, self._left - now))}"
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=self._stream, flush=True)
        else:
            print(text, file=self._stream, flush=True)
