"""A process of its own that tells what became of another one. Run as a script; imports nothing but the standard library.

JAX ends a process at once, from C++, when the one that coordinates (process 0) is gone; so does a system that is out of
memory. Neither leaves time for a message that says where the run was. The witness reads places from its standard input,
one per line, and speaks when the input ends without the line ``end``.

    python witness.py NAME COORDINATOR      e.g. witness.py 'process 1 of 2 (host a)' 10.0.0.1:1234; '' for process 0
"""

import signal
import socket
import sys


def answers(address: str, seconds: float = 3.0) -> bool:
    """Whether something listens at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()
        return True
    except (OSError, ValueError):
        return False


def last_words(name: str, place: str, coordinator: str) -> str:
    """What there is to say of a process that ended without a word, last at ``place``."""
    if coordinator and not answers(coordinator):
        why = (f"process 0, which coordinates the run at {coordinator}, is gone, and JAX then ends the others (its lines "
               f"are above); the output of process 0 says more")
    else:
        why = "it was killed from outside (out of memory? preempted?) or crashed; lines above may say more"
    return f"moe-jax: error: {name} ended without a word at {place}: {why}. The same command on every host resumes."


def main() -> None:
    name, coordinator = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the run; this process ends with its input
        signal.signal(number, signal.SIG_IGN)
    place = "its start"
    for line in sys.stdin:
        if line == "end\n":
            return
        place = line.strip()
    print(last_words(name, place, coordinator), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
