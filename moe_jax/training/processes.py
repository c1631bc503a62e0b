"""Several processes, one run: joining them, waiting for each other with a name and a limit, and ending together.

Everything that hosts tell each other (barriers, choices of process 0, comparisons, signs of life) goes through JAX's
coordination service and never over the devices: it works while they compile, hang or have lost a peer. With one process
every function here returns at once, and nothing is started.

JAX has no public interface to that service (0.10 to 0.12); :class:`_Service` is the one place that reaches for it.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

from moe_jax.errors import UserError
from moe_jax.training import witness
from moe_jax.training.watch import Watch

log = logging.getLogger("moe_jax")

TIMEOUT = 300.0  # seconds at one place: a step, a barrier
COMPILING = 3600.0  # compiling a program, starting, restoring
PREPARING = 6 * 3600.0  # a place where a corpus may be read, or a report made
SHARED_WITHIN = 15.0  # until one host sees what another wrote to a network file system
_SHUTDOWN = 30.0


class ProcessError(UserError, RuntimeError):
    """The processes of a run differ, or one of them is missing; the message is one line for people."""


class _Service:
    """JAX's coordination service: text by key, and barriers. Every use of JAX's private interface is in this class.

    ``client`` has ``key_value_set``, ``key_value_dir_get``, ``blocking_key_value_get`` and ``wait_at_barrier``; all of them
    let other threads run while they wait, and raise ``jax.errors.JaxRuntimeError``.
    """

    _PREFIX = "moe_jax/"

    def __init__(self):
        from jax._src import distributed

        self.client = distributed.global_state.client
        self.coordinator = distributed.global_state.coordinator_address or ""

    def put(self, key: str, text: str) -> None:
        self.client.key_value_set(self._PREFIX + key, text, allow_overwrite=True)

    def list(self, folder: str) -> dict[str, str]:
        found = self.client.key_value_dir_get(self._PREFIX + folder)
        return {key.removeprefix(self._PREFIX + folder): text for key, text in found}

    def get(self, key: str, seconds: float) -> str:
        return self.client.blocking_key_value_get(self._PREFIX + key, int(1000 * seconds))

    def barrier(self, name: str, seconds: float) -> None:
        self.client.wait_at_barrier(self._PREFIX + name, int(1000 * seconds))


@dataclasses.dataclass
class _Cluster:
    """What this process knows of the run's others."""

    service: _Service
    index: int
    names: list[str]
    timeout: float
    watch: Watch = None
    witness: subprocess.Popen | None = None
    uses: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def unique(self, name: str) -> str:
        """``name`` with the number of its use; the same on all processes, which do the same things in the same order."""
        self.uses[name] += 1
        return f"{name}#{self.uses[name]}"


_cluster: _Cluster | None = None
_timeout = TIMEOUT


# Joining and leaving.


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None,
          timeout: float = TIMEOUT) -> None:
    """Makes this process one of several. Call it before anything asks JAX for a device.

    Args:
      coordinator: ``host:port`` of process 0. num_processes, process_id: how many there are, and which one this is.
        All three None: JAX finds them by itself (TPU slices, GKE, Slurm, Open MPI).
      timeout: seconds to wait for the others: here, at barriers, at every step.

    Raises:
      ProcessError: JAX finds no cluster, or cannot join it.
    """
    global _timeout
    _timeout = timeout
    _keep_standard_output_for_results()
    # Its handler would swallow SIGTERM; stopping together is the watch's work.
    jax.config.update("jax_enable_preemption_service", False)
    here = f"process {process_id} of {num_processes}" if coordinator else f"the process on {socket.gethostname()}"
    # JAX aborts when its own limits are reached, without saying which process is missing: ours come first.
    guard = threading.Timer(timeout, _give_up, (
        f"{here} waited {timeout:.0f} s for all processes to connect to process 0"
        + (f" at {coordinator}" if coordinator else "")
        + ". Start the same command on every host within that time (--timeout=… for longer); the address must be one that "
          "every host reaches, and every --process-id from 0 to --num-processes - 1 must be used once.",))
    guard.daemon = True
    guard.start()
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=int(timeout) + 60,
            heartbeat_timeout_seconds=int(2 * timeout) + 100, shutdown_timeout_seconds=int(_SHUTDOWN),
            cluster_detection_method="deactivate" if coordinator else None)
        jax.process_count()  # all processes exchange their devices
    except (ValueError, RuntimeError, OSError) as error:
        raise ProcessError(
            f"JAX cannot join the processes ({_one_line(error)}). Where it does not find them by itself, give "
            f"--coordinator=HOST:PORT --num-processes=N --process-id=I.") from error
    finally:
        guard.cancel()
    _join()


def _give_up(message: str) -> NoReturn:
    print(f"moe-jax: error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _keep_standard_output_for_results() -> None:
    """Collectives between CPU processes print to the standard output from C++; that goes to stderr from now on."""
    try:
        if sys.stdout.fileno() != 1:
            return
    except (OSError, ValueError, AttributeError):
        return
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w", buffering=1, errors="backslashreplace")


def _join() -> _Cluster:
    """Meets the others and starts to watch over them."""
    global _cluster
    service, index = _Service(), jax.process_index()
    if service.client is None:
        raise ProcessError(f"{jax.process_count()} processes, but JAX's coordination service was not started: pass "
                           f"--distributed, or call jax.distributed.initialize() first.")
    count = jax.process_count()
    own = f"process {index} of {count} (pid {os.getpid()} on {socket.gethostname()})"
    service.put(f"name/{index}", own)
    cluster = _Cluster(service, index, [f"process {i} of {count}" for i in range(count)], _timeout)
    cluster.watch = Watch(service, index, cluster.names, _timeout, _end)
    _cluster = cluster
    barrier("the start")
    names = service.list("name/")
    cluster.names[:] = [names[str(i)] for i in range(count)]
    cluster.witness = subprocess.Popen(
        [sys.executable, "-I", witness.__file__, own, service.coordinator if index else ""], stdin=subprocess.PIPE,
        start_new_session=True)
    os.set_blocking(cluster.witness.stdin.fileno(), False)
    cluster.watch.tell = _tell_witness
    cluster.watch.start()
    return cluster


def _tell_witness(line: str) -> None:
    """One write, so that lines of several threads do not mix, and none that waits: a step must not, for a witness."""
    with contextlib.suppress(OSError, ValueError):
        os.write(_cluster.witness.stdin.fileno(), (line.replace("\n", " ") + "\n").encode())


def _joined() -> _Cluster | None:
    """The cluster, or None for a single process. A program that called jax.distributed.initialize() itself joins here."""
    if _cluster is not None:
        return _cluster
    return _join() if jax.process_count() > 1 else None


def leave(why: str | None, code: int = 1) -> None:
    """The end of this process's part; harmless with one process.

    Args:
      why: None: all processes end together here. Otherwise the error that this one ends with: the others are told, and
        **the function does not return** (JAX would wait for them in vain).
      code: the exit code of a process that ends with an error.
    """
    global _cluster
    cluster = _cluster
    if cluster is None:
        return
    if why is not None:
        _say_goodbye(why)
        os._exit(code)
    try:
        barrier("the end", PREPARING)
    except ProcessError as error:
        _end(str(error))
    cluster.watch.close()
    _tell_witness("end")
    _cluster = None
    jax.distributed.shutdown()


def _end(message: str) -> NoReturn:
    """Ends this process while its main thread may hang in a collective."""
    print(f"moe-jax: error: {message}", file=sys.stderr, flush=True)
    _say_goodbye(message)
    os._exit(1)


def _say_goodbye(why: str) -> None:
    """Tells the others. Process 0 stays until they have ended too, or should have: JAX aborts those it leaves behind."""
    cluster = _cluster
    longest = (10 if cluster.index == 0 else 2) * cluster.watch.interval

    def talk():
        cluster.service.put(f"ended/{cluster.index}", why)
        until = time.monotonic() + longest
        while cluster.index == 0 and time.monotonic() < until:
            gone = {int(key) for key in cluster.service.list("ended/")} | cluster.watch.missing()
            if len(gone | {0}) == len(cluster.names):
                time.sleep(0.5)  # they have said so, and are about to end
                return
            time.sleep(0.1)

    cluster.watch.at("its end", math.inf)  # the watch has nothing more to say
    talking = threading.Thread(target=talk, daemon=True)  # the service itself may be what is missing
    talking.start()
    talking.join(longest + 1)
    _tell_witness("end")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def fail(error: BaseException) -> None:
    """Ends this process for an error nobody foresaw; returns if it is the only one.

    A lost peer breaks collectives (or leaves them hanging). So the watch first gets the time to find one, and its message
    then names the peer; if all are alive, the error with its traceback is what there is to say.
    """
    if _cluster is None:
        return
    watch = _cluster.watch
    if isinstance(error, jax.errors.JaxRuntimeError):
        watch.at(f"{watch.place.name}, which failed ({_one_line(error)[:200]})")
        time.sleep(watch.silence + 5 * watch.interval)
    traceback.print_exception(error)
    leave(f"{type(error).__name__}: {_one_line(error)}")


# Waiting for each other.


def index() -> int:
    """This process's number; process 0 writes the files."""
    return jax.process_index()


def several() -> bool:
    return jax.process_count() > 1


def at(place: str, seconds: float | None = None) -> None:
    """Where the main thread is now, for messages, and how many seconds it may be there (default: the timeout)."""
    if _cluster is not None:
        _cluster.watch.at(place, None if seconds is None else max(seconds, _cluster.timeout))


@contextlib.contextmanager
def place(name: str, seconds: float | None = None) -> Iterator[None]:
    """:func:`at` for a while; then at the old place again."""
    before = _cluster.watch.place if _cluster is not None else None
    at(name, seconds)
    yield
    if before is not None:
        at(before.name, before.limit)


def barrier(name: str, seconds: float | None = None) -> None:
    """Returns when every process has come here.

    Raises:
      ProcessError: not all came within ``seconds`` (default: the timeout); the message names the barrier and who is
        missing. A process that is dead ends the run earlier, from the watch.
    """
    cluster = _joined()
    if cluster is None:
        return
    seconds = cluster.timeout if seconds is None else max(seconds, cluster.timeout)
    key = cluster.unique(name)
    cluster.service.put(f"barrier/{key}/{cluster.index}", "")
    with place(f"the barrier {name!r}", seconds + 30):
        try:
            cluster.service.barrier(key, seconds)
        except jax.errors.JaxRuntimeError as error:
            raise _missing_at(cluster, name, key, seconds, error) from error


def _missing_at(cluster: _Cluster, name: str, key: str, seconds: float, error: Exception) -> ProcessError:
    try:
        there = {int(i) for i in cluster.service.list(f"barrier/{key}/")}
        cluster.watch.look()
    except jax.errors.JaxRuntimeError:
        there = {cluster.index}
    absent = [i for i in range(len(cluster.names)) if i not in there]
    if not absent:
        return ProcessError(f"The barrier {name!r} failed: {_one_line(error)}")
    return ProcessError(
        f"{cluster.names[cluster.index]} waited {seconds:.0f} s at the barrier {name!r} for "
        + "; ".join(cluster.watch.describe(i) for i in absent[:4])
        + (f"; and {len(absent) - 4} more" if len(absent) > 4 else "")
        + ". Its output says more; --timeout=… waits longer.")


def compiled_together(function: Callable, name: str) -> Callable:
    """A function of ``jax.jit``, for arguments of one shape; as it is where there is one process.

    Of several, each compiles it at its first call, and none runs it before all have: a collective between CPUs waits 30 s
    for a late peer and then fails (that limit is the library's), and compiling may take longer on one host. Programs that
    differ (by the order of a set, say) would wait for each other in different collectives; they are refused.

    Raises:
      ProcessError: at a call, the first: the processes' programs differ, or not all compile it within the limit.
    """
    if not several():
        return function
    compiled = None

    def call(*operands):
        nonlocal compiled
        if compiled is None:
            with place(f"compiling {name}", COMPILING):
                lowered = function.lower(*operands)
                _require_one_program(name, lowered)
                compiled = lowered.compile()
            barrier(f"{name} is compiled", COMPILING)
        return compiled(*operands)

    return call


def _require_one_program(name: str, lowered: jax.stages.Lowered) -> None:
    # Not compared: what kernels are made of, which may name files of the host.
    text = re.sub(r'backend_config = "[^"]*"', "", lowered.as_text())
    digests = gather(f"the program of {name}", hashlib.sha256(text.encode()).hexdigest())
    others = [i for i, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ProcessError(
            f"The program of {name} is another one on process {_numbers(others)} than on process 0, and they would wait for "
            f"each other for ever. They were started alike, so the code makes it differ: something in it depends on the "
            f"order of a set, on the process's number or on its files.")


def gather(name: str, value: Any) -> list[Any]:
    """The values (JSON) of all processes, in their order; everybody calls it.

    Raises:
      ProcessError: somebody did not, within the timeout.
    """
    cluster = _joined()
    if cluster is None:
        return [value]
    key = cluster.unique(f"gather {name}")
    cluster.service.put(f"{key}/{cluster.index}", json.dumps(value))
    barrier(name)
    found = cluster.service.list(f"{key}/")
    return [json.loads(found[str(i)]) for i in range(len(cluster.names))]


def of_process_0(name: str, make: Callable[[], Any], seconds: float | None = None) -> Any:
    """What ``make()`` gives (JSON) on process 0, on every process; only process 0 calls ``make``.

    Raises:
      ProcessError: process 0 did not say within ``seconds`` (default: the timeout).
    """
    cluster = _joined()
    if cluster is None:
        return make()
    key = cluster.unique(f"chosen {name}")
    if cluster.index == 0:
        value = make()
        cluster.service.put(key, json.dumps(value))
        return value
    seconds = cluster.timeout if seconds is None else max(seconds, cluster.timeout)
    with place(f"the choice {name!r} of process 0", seconds + 30):
        try:
            return json.loads(cluster.service.get(key, seconds))
        except jax.errors.JaxRuntimeError as error:
            raise ProcessError(f"{cluster.names[cluster.index]} waited {seconds:.0f} s for {cluster.names[0]} to say "
                               f"{name!r}: {_one_line(error)}") from error


def require_equal(name: str, values: dict[str, Any]) -> None:
    """Refuses a run whose processes were started differently.

    Raises:
      ProcessError: on every process, the same: which entries differ, and on which processes they are what.
    """
    everybody = gather(name, values)
    keys = sorted(set().union(*everybody))
    lines = []
    for key in keys:
        by_value = collections.defaultdict(list)
        for process, found in enumerate(everybody):
            by_value[json.dumps(found.get(key), sort_keys=True)].append(process)
        if len(by_value) > 1:
            told = [f"{text} on process{'es' if len(where) > 1 else ''} {_numbers(where)}" for text, where in by_value.items()]
            lines.append(f"{key} is {' and '.join(told)}")
    if lines:
        more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise ProcessError(f"The processes of this run differ: {'; '.join(lines[:8])}{more}. Every host needs the same "
                           f"command, the same code and the same packages.")


def _numbers(processes: list[int]) -> str:
    shown = ", ".join(map(str, processes[:6]))
    return shown + (f" and {len(processes) - 6} more" if len(processes) > 6 else "")


def is_first_of_host() -> bool:
    """Whether this process is the first of its host, which prepares what the host's processes share."""
    hosts = gather("the hosts", socket.gethostname())
    return hosts.index(socket.gethostname()) == index()


def require_shared(folder: pathlib.Path) -> None:
    """Refuses a run directory that is another one on another host: checkpoints are written by all processes together.

    Raises:
      ProcessError: on every process, naming those that do not see what process 0 wrote there.
    """
    if _joined() is None:
        return
    sign = folder / ".shared"

    def write() -> str:
        token = f"{os.getpid()}-{time.time_ns()}"
        try:
            sign.write_text(token)
        except OSError as error:
            raise ProcessError(f"Cannot write {sign}: {error.strerror or error}. Choose a --workdir that you may write "
                               f"to.") from error
        return token

    token = of_process_0("the run directory's sign", write)
    until = time.monotonic() + SHARED_WITHIN
    while not (seen := _reads(sign, token)) and time.monotonic() < until:
        time.sleep(0.2)
    sees = gather("the run directory", seen)
    if index() == 0:
        sign.unlink(missing_ok=True)
    if not all(sees):
        blind = [i for i, seen in enumerate(sees) if not seen]
        raise ProcessError(f"{folder} of process {_numbers(blind)} is not the folder of process 0: all processes need one "
                           f"shared --workdir, on a network file system or a mounted bucket.")


def _reads(path: pathlib.Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


# Stopping together.


def ask_to_stop(number: int) -> None:
    """This process got a signal; all are to stop at the same point. May be called from any thread."""
    if _cluster is not None:
        _cluster.watch.ask_to_stop(number)


def stop_signal(received: int | None) -> int | None:
    """The signal for which the run stops at this point, or None: with one process the one it received, with several the
    one that anybody did, at the same point on all. All processes must call it equally often."""
    if _cluster is None:
        return received
    if received is not None:
        _cluster.watch.ask_to_stop(received)
    return _cluster.watch.stop_signal()


def agreed_to_stop() -> bool:
    return _cluster is not None and _cluster.watch.agreed_to_stop


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]
