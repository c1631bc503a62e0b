"""SIGTERM and SIGINT while a run trains: it saves itself and ends."""

import logging
import os
import signal
import threading
from typing import Any

from moe_jax.training import processes

log = logging.getLogger("moe_jax")


class Interrupted(SystemExit):
    """SIGTERM or SIGINT: the run saved itself and ends with the signal's exit code."""


class Signals:
    """SIGTERM and SIGINT: the first sets a flag that the loop polls; the second ends the process.

    Until ``polling`` is set there is nothing to save, and the first one raises :class:`Interrupted` at once. A thread
    listens, because Python runs handlers between two of its own instructions: not while XLA compiles or a device hangs.
    """

    def __init__(self):
        self.received: int | None = None
        self.polling = False
        self._before: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():  # a notebook's worker: signals stay as they are
            return self
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._in_main_thread)
        threading.Thread(target=self._listen, args=(read_end,), name="moe_jax-signals", daemon=True).start()
        return self

    def _in_main_thread(self, number, frame):
        if not self.polling:
            raise Interrupted(128 + number)

    def _listen(self, read_end: int):
        while received := os.read(read_end, 1):
            number = received[0]
            if number not in self._before:
                continue
            if self.received is not None:
                os._exit(128 + number)
            self.received = number
            if self.polling:
                processes.ask_to_stop(number)
                log.warning("%s: stopping after this step; once more stops at once", signal.Signals(number).name)
        os.close(read_end)

    def __exit__(self, *exception):
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)  # ends the thread
