"""The environment of the tests: eight CPU devices, strict shapes, caches that the test processes share.

Everything is an environment variable and is set before jax is imported, so that the processes that tests start
see the same.
"""

import gc
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

assert "jax" not in sys.modules, "jax was imported before tests/conftest.py could ask for eight CPU devices"


def cpu_fingerprint() -> str:
    """Compiled code is only reused on a processor with the same instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:8]


def persistent_cache() -> Path:
    """A folder that outlives the test run: compiled programs, matplotlib's list of fonts."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (home / "moe_jax_tests", Path(tempfile.gettempdir()) / f"moe_jax_tests_{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="moe_jax_tests_"))


def add_xla_flags(*flags: str) -> None:
    given = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.split("=")[0] for flag in flags}
    os.environ["XLA_FLAGS"] = " ".join([flag for flag in given if flag.split("=")[0] not in names] + list(flags))


IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

if not IS_WORKER:  # the workers inherit all of this
    persistent = persistent_cache()
    session = tempfile.mkdtemp(prefix="moe_jax_test_session_")
    add_xla_flags(
        "--xla_force_host_platform_device_count=8",
        # Eight devices on two busy cores can be late to a collective; XLA ends the process after 40 s otherwise.
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
    # With filelock and a limit on the size JAX locks the folder of compiled programs. It cannot share one with
    # processes that do not lock.
    locked = importlib.util.find_spec("filelock") is not None
    jax_version = importlib.metadata.version("jax")
    compiled = persistent / f"jax-{jax_version}-{cpu_fingerprint()}{'' if locked else '-unlocked'}"
    if locked:
        os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**31)
        # A test that kills a process can leave half an entry (it has no -atime beside it); JAX never mends that.
        for entry in compiled.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink(missing_ok=True)
    os.environ.update(
        JAX_PLATFORMS="cpu",
        JAX_NUMPY_RANK_PROMOTION="raise",  # adding [D] to [T, D] by accident is an error, in our code as in STYLE.md
        JAX_COMPILATION_CACHE_DIR=str(compiled),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.3",
        # Corpora, vocabularies and tokens: made once in a test session, by whichever worker comes first.
        MOE_JAX_TEST_SESSION=session,
        MOE_JAX_CACHE=os.path.join(session, "moe_jax"),
        XDG_CACHE_HOME=os.path.join(session, "xdg"),
        TFDS_DATA_DIR=os.path.join(session, "tfds"),
        MPLCONFIGDIR=str(persistent / "matplotlib"),
        MPLBACKEND="Agg",
        # TensorFlow: no banner, no GPU, no question to Google's metadata server.
        TF_CPP_MIN_LOG_LEVEL="3",
        TF_ENABLE_ONEDNN_OPTS="0",
        CUDA_VISIBLE_DEVICES="",
        NO_GCE_CHECK="true",
        GRPC_VERBOSITY="ERROR",
        WANDB_MODE="disabled",
    )
else:
    # Several test processes share the cores, so each keeps to one thread where it has the choice.
    for name in ("PJRT_NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ[name] = "1"


# Linux lets a process have 65,530 mappings. Every compiled program takes several, and where there are no more the
# compiler dies of a segmentation fault.
MOST_MAPPINGS, TESTS_BETWEEN_LOOKS = 25_000, 4
tests_since_look = 0


def pytest_runtest_teardown(item, nextitem):
    global tests_since_look
    tests_since_look += 1
    left_module = nextitem is None or nextitem.path != item.path
    if not left_module and tests_since_look < TESTS_BETWEEN_LOOKS:
        return
    tests_since_look = 0
    if "jax" in sys.modules and mappings() > MOST_MAPPINGS:
        sys.modules["jax"].clear_caches()
        gc.collect()


def mappings() -> int:
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:  # not Linux
        return 0


def pytest_terminal_summary(terminalreporter):
    """Says whether the tests that compile for TPUs ran: nobody reads a count of skipped tests."""
    skipped = [report for report in terminalreporter.stats.get("skipped", ())
               if isinstance(report.longrepr, tuple) and "libtpu" in report.longrepr[2]]
    if skipped:
        terminalreporter.write_sep("=", "SKIPPED: programs for TPUs", yellow=True)
        terminalreporter.write_line(f"{len(skipped)} tests compile for TPUs and were skipped: {skipped[0].longrepr[2]}")
    elif importlib.util.find_spec("libtpu"):
        terminalreporter.write_line(f"programs for TPUs are compiled with libtpu {importlib.metadata.version('libtpu')}")
    else:
        terminalreporter.write_line("libtpu is not installed (pip install '.[tpu]'): no test could compile for a TPU")


def pytest_unconfigure(config):
    if not IS_WORKER:
        shutil.rmtree(os.environ["MOE_JAX_TEST_SESSION"], ignore_errors=True)
