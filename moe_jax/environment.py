"""What must be set in a process before JAX starts."""

import ctypes
import importlib.util
import os
import pathlib


def prepare_process(devices: int) -> None:
    """What must be set before JAX starts: fake CPU devices, and an allocator that keeps its memory."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split()
             if not flag.startswith("--xla_force_host_platform_device_count=")]
    names = {flag.split("=")[0] for flag in flags}
    # Only the CPU backend reads these; with an accelerator they change nothing.
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    # Several devices on few cores may be late to a collective; XLA would end the process after 40 s.
    for name, seconds in (("warn_stuck", 120), ("terminate", 1200)):
        flag = f"--xla_cpu_collective_call_{name}_timeout_seconds"
        if flag not in names:
            flags.append(f"{flag}={seconds}")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if _installed("libtpu") and not has_tpu() and not any(map(_installed, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        # libtpu is there to compile for TPUs elsewhere; looking for one here it prints errors.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    keep_freed_memory()


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# PCI device numbers of Google's TPUs (vendor 0x1ae0), as in tools/install.py.
TPU_PCI_DEVICES = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")


def has_tpu() -> bool:
    """Whether this machine has a TPU, without asking libtpu."""
    def number(device, name):
        try:
            return (device / name).read_text().strip()
        except OSError:
            return ""

    return os.path.exists("/dev/accel0") or any(
        number(vendor.parent, "vendor") == "0x1ae0" and number(vendor.parent, "device") in TPU_PCI_DEVICES
        for vendor in pathlib.Path("/sys/bus/pci/devices").glob("*/vendor"))


def keep_freed_memory() -> None:
    """Tells glibc's allocator not to give memory back after every step. XLA on CPU allocates its temporaries anew at
    each call, and the page faults cost up to a quarter of the time. Elsewhere this does nothing."""
    largest, trim_threshold, mmap_threshold = 2**31 - 1, -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(mmap_threshold, largest)
    mallopt(trim_threshold, largest)
