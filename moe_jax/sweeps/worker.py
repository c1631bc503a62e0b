"""A process that runs jobs of sweeps, one after another: what was imported and compiled serves the next.

    python -m moe_jax.sweeps.worker DEVICES JSON

One job per line on stdin, as JSON; one answer per line on what was stdout: {"done": …} or {"error": …}. When stdin ends
early, because the sweep was stopped or killed, training saves itself and the process ends.
"""

import json
import logging
import os
import pathlib
import signal
import sys
import threading
import traceback
from typing import Any

from moe_jax.environment import prepare_process


def main(argv: list[str]) -> int:
    devices, extra = argv
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints goes to the log
    prepare_process(int(devices))
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("moe_jax").setLevel(logging.INFO)
    for line in _lines_until_the_end():
        print(f"=== {line.strip()}", file=sys.stderr, flush=True)
        print(json.dumps(_answer(json.loads(line), json.loads(extra))), file=answers, flush=True)
    return 0


def _answer(words: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    from moe_jax.errors import UserError
    try:
        from moe_jax.sweeps.definition import load_sweep
        from moe_jax.sweeps.jobs import Job, run_job
        sweep = load_sweep(pathlib.Path(words["folder"]))
        run_job(sweep, Job(words["arm"], words["scale"], words["seed"], tuple(words["wanted"])), pathlib.Path(words["results"]),
                pathlib.Path(words["scratch"]), extra)
        return {"done": True}
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:  # the job fails, the others go on
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}


def _lines_until_the_end():
    """The lines of stdin. A thread reads them, so that its end is seen while a job runs."""
    import queue

    lines: queue.Queue[str | None] = queue.Queue()
    busy = threading.Event()

    def read():
        for line in sys.stdin:
            lines.put(line)
        if busy.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
        lines.put(None)

    threading.Thread(target=read, name="jobs", daemon=True).start()
    while (line := lines.get()) is not None:
        busy.set()
        yield line
        busy.clear()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
