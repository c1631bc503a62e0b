"""Watches over a run of several processes: who is alive, where each one is, and at which step all of them stop.

The main thread says where it is (:meth:`Watch.at`: an assignment, and a line to the witness). Two threads do the rest.
One exchanges signs of life through a store that all processes see (JAX's coordination service), and looks at the
others' only while its own process has been at one place for a while: a healthy run costs a few small messages per
minute. The other looks at the clock, so that a store that does not answer is noticed too.
"""

import dataclasses
import json
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger("moe_jax")

QUIET = 3  # intervals at one place after which a process looks at the others


class Store(Protocol):
    """Text by key, the same for all processes. Both may raise, or take long, when the store is gone."""

    def put(self, key: str, text: str) -> None: ...

    def list(self, folder: str) -> dict[str, str]: ...


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process is, since when (by its clock), and how many seconds it may be there."""

    name: str
    since: float
    limit: float


@dataclasses.dataclass
class _Peer:
    """What was last seen of another process: its beat, when we first saw that one, its place and the seconds there."""

    beat: int
    seen: float
    place: str
    seconds: float


class Watch:
    """One process's watch over the others.

    Args:
      store: see :class:`Store`.
      index: this process. names: what to call each process in messages.
      timeout: seconds that a place may take unless :meth:`at` is given others.
      end: called with the message when the run cannot go on; must not return in a real run.
      tell: called with the name of each new place (for the witness).
      clock: seconds.
    """

    def __init__(self, store: Store, index: int, names: list[str], timeout: float, end: Callable[[str], None],
                 tell: Callable[[str], None] = lambda place: None, clock: Callable[[], float] = time.monotonic):
        self.index, self.names, self.timeout = index, names, timeout
        self.interval = min(max(2.0, len(names) / 200), timeout / 20)
        self.silence = min(60.0, timeout / 2)  # of a process or the store: then it counts as dead
        self._store, self._end, self.tell, self._clock = store, end, tell, clock
        self._place = Place("the start", clock(), timeout)
        self._beat, self._heard, self._warned = 0, clock(), -math.inf
        self._looked = -math.inf
        self._peers: dict[int, _Peer] = {}
        self._ended: dict[int, str] = {}
        self._stopping = _Stop(store, index, len(names))
        self._closed = threading.Event()

    def start(self) -> None:
        self.exchange()
        for work in (self._exchange_again_and_again, self._look_again_and_again):
            threading.Thread(target=work, name="moe_jax-watch", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    # For the main thread.

    @property
    def place(self) -> Place:
        return self._place

    def at(self, name: str, seconds: float | None = None) -> None:
        """The main thread is now at ``name``; ``seconds`` that it may be there (default: the timeout)."""
        self._place = Place(name, self._clock(), self.timeout if seconds is None else seconds)
        self.tell(name)

    def ask_to_stop(self, number: int) -> None:
        """Wants all processes to stop, for the signal ``number``. May be called from any thread."""
        self._stopping.wanted = number

    def stop_signal(self) -> int | None:
        """The signal for which all processes stop here, or None. All processes call it at the same points of the run,
        and get the same answer at the same point."""
        return self._stopping.reached()

    @property
    def agreed_to_stop(self) -> bool:
        return self._stopping.agreed is not None

    # The two threads.

    def _exchange_again_and_again(self) -> None:
        while not self._closed.wait(0.05 if self._stopping.holding else self.interval):
            try:
                self.exchange()
            except Exception as error:  # the store is gone; the other thread counts the seconds
                log.debug("the coordination service: %s", error)

    def _look_again_and_again(self) -> None:
        while not self._closed.wait(self.interval):
            message = self.judge()
            if message is not None and not self._closed.is_set():
                self._end(message)
                return

    def exchange(self) -> None:
        """Gives a sign of life, takes part in an agreement to stop, and looks at the others where there is a reason."""
        place, now = self._place, self._clock()
        self._beat += 1
        self._store.put(f"alive/{self.index}", json.dumps([self._beat, place.name, round(now - place.since)]))
        self._stopping.exchange()
        if now - place.since >= QUIET * self.interval:
            self.look()
        self._heard = self._clock()

    def look(self) -> None:
        """Reads what the others last said."""
        ended, alive = self._store.list("ended/"), self._store.list("alive/")
        now = self._clock()
        self._ended = {int(key): why for key, why in ended.items() if int(key) != self.index}
        for key, text in alive.items():
            beat, place, seconds = json.loads(text)
            known = self._peers.get(int(key))
            if known is None or known.beat != beat:
                self._peers[int(key)] = _Peer(beat, now, place, seconds)
        self._looked = now

    def judge(self) -> str | None:
        """Why the run cannot go on, or None; logs a line now and then while it waits."""
        place, now = self._place, self._clock()
        waited = now - place.since
        here = f"{self.names[self.index]} has waited {waited:.0f} s at {place.name}"
        if place.limit == math.inf:
            return None
        if self._ended:
            process, why = min(self._ended.items())
            return f"{self.names[process]} ended: {why} ({here})"
        if now - self._heard > self.silence:
            return (f"{self.names[0]}, which coordinates the run, has not answered for {now - self._heard:.0f} s "
                    f"({here}). {_ADVICE}")
        if self._looked < place.since:
            return None
        dead = self._silent()
        if dead:
            lines = "; ".join(f"{self.names[process]} has given no sign of life for {self._looked - peer.seen:.0f} s, last "
                              f"at {peer.place}" for process, peer in dead.items())
            return f"{lines} ({here}). {_ADVICE}"
        if waited > place.limit:
            return f"{here}, longer than {place.limit:.0f} s. {self._where_others_are()}. {_ADVICE}"
        if waited > min(place.limit / 2, 120.0) and now - self._warned >= 60.0:
            self._warned = now
            log.warning("%s. %s", here, self._where_others_are())
        return None

    def _silent(self) -> dict[int, _Peer]:
        return {process: peer for process, peer in sorted(self._peers.items())
                if process != self.index and self._looked - peer.seen > self.silence}

    def describe(self, process: int) -> str:
        """Another process and where it was last seen."""
        peer = self._peers.get(process)
        if process in self._ended:
            return f"{self.names[process]}, which ended: {self._ended[process]}"
        return self.names[process] if peer is None else f"{self.names[process]}, last seen at {peer.place}"

    def _where_others_are(self) -> str:
        """The others by their places; first those who have been longest at one."""
        others = sorted((-peer.seconds, process) for process, peer in self._peers.items() if process != self.index)
        told = [f"{self.names[process]} is alive, at {self._peers[process].place} for {-seconds:.0f} s"
                for seconds, process in others[:4]]
        return "; ".join(told) + (f"; and {len(others) - 4} more" if len(others) > 4 else "")

    def missing(self) -> set[int]:
        """Processes that gave no sign of life, or said that they ended; by the last look."""
        return set(self._silent()) | set(self._ended)


_ADVICE = ("Its output says more; end what is left of the run, then the same command on every host goes on from the last "
           "checkpoint")


class _Stop:
    """Agreement to stop at the same point, without a collective: JAX's preemption sync points, for any signal.

    Every process counts the points it has passed. Once somebody wants to stop, each holds at its next point, reports its
    count, and goes on when all have reported: to the point after the largest count. The reports are made by the watch's
    thread, so a main thread that waits in a collective for one that holds is no obstacle.
    """

    def __init__(self, store: Store, index: int, count: int):
        self._store, self._index, self._count = store, index, count
        self._condition = threading.Condition()
        self._passed = 0
        self.wanted: int | None = None
        self.holding, self.agreed, self._signal, self._reported = False, None, 0, False

    def exchange(self) -> None:
        if self.agreed is not None:
            return
        if self.wanted is not None and not self.holding:
            self._store.put("stop/signal", str(self.wanted))
        said = self._store.list("stop/")
        if "signal" not in said:
            return
        if not self._reported:
            with self._condition:
                self.holding = True  # from here on the main thread passes no point
            self._store.put(f"stop/passed/{self._index}", str(self._passed))
            self._reported = True
            return
        reports = [int(text) for key, text in said.items() if key.startswith("passed/")]
        if len(reports) == self._count:
            with self._condition:
                self._signal, self.agreed, self.holding = int(said["signal"]), max(reports), False
                self._condition.notify_all()

    def reached(self) -> int | None:
        with self._condition:
            while self.holding:
                self._condition.wait()
            if self.agreed is not None and self._passed >= self.agreed:
                return self._signal
            self._passed += 1
            return None
