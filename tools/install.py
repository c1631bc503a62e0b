"""Make the virtual environment that `make train` and `make test` run in, or find that it is as it should be.

    python3 tools/install.py [--extras data,dev] [--accelerator auto|cpu|cuda|cuda13|tpu] [--venv .venv]

A second call is instant: the environment carries a note of what was installed into it, and the note is written
last, so a half-made environment has none. An environment that is broken, half-made or made for another checkout
is made again. Only the standard library is used, and nothing newer than Python 3.6, so that an old `python3`
gets a sentence and not a traceback.
"""

import argparse
import contextlib
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

SUPPORTED = ((3, 11), (3, 12), (3, 13))
CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ACCELERATORS = ("auto", "cpu", "cuda", "cuda13", "tpu")
NOTE = "moe_jax_install.json"

# PCI device numbers of Google's TPUs (vendor 0x1ae0; that vendor alone may be a virtual network card).
TPU_PCI_DEVICES = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")


def say(line):
    print(line, flush=True)


def stop(line):
    sys.exit("make: " + line)


def spoken(version):
    return ".".join(str(part) for part in version)


def first_line(path):
    try:
        with open(path) as file:
            return file.readline().strip()
    except OSError:
        return ""


# ---------------------------------------------------------------------------- what this machine has


def accelerator_of_this_machine():
    if os.path.exists("/dev/accel0"):
        return "tpu"
    for vendor in glob.glob("/sys/bus/pci/devices/*/vendor"):
        if first_line(vendor) == "0x1ae0" and first_line(os.path.join(os.path.dirname(vendor), "device")) in TPU_PCI_DEVICES:
            return "tpu"
    if os.path.exists("/dev/nvidia0"):
        return "cuda"
    if shutil.which("nvidia-smi"):  # WSL has no /dev/nvidia0
        answer = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
        if answer.returncode == 0 and b"GPU 0" in answer.stdout:
            return "cuda"
    return "cpu"


def runs(command):
    """Whether the command is there and works (pyenv's shims are there for every version, and may not)."""
    try:
        answer = subprocess.run([command, "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return False
    return answer.returncode == 0


def check_this_python():
    """Stops with one line if this interpreter cannot make the environment."""
    if sys.version_info[:2] not in SUPPORTED:
        names = ["python" + spoken(version) for version in reversed(SUPPORTED)]
        found = [name for name in names if runs(name)]
        stop(
            "%s is Python %s; moe_jax runs on %s. %s"
            % (
                sys.executable,
                spoken(sys.version_info[:3]),
                ", ".join(spoken(version) for version in SUPPORTED),
                "%s is here: add PYTHON=%s to the make command." % (found[0], found[0])
                if found
                else "Install one of these and name it: make train PYTHON=/path/to/python3.12",
            )
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        stop(
            "%s lacks the modules venv and ensurepip. On Debian and Ubuntu they are in the package python%s-venv; "
            "or name another Python: make train PYTHON=/path/to/python3.12" % (sys.executable, spoken(sys.version_info[:2]))
        )


# ---------------------------------------------------------------------------- the environment


class Environment:
    def __init__(self, path):
        self.path = os.path.abspath(path)
        self.shown = os.path.relpath(self.path) if self.path.startswith(os.getcwd() + os.sep) else self.path
        self.python = os.path.join(self.path, "bin", "python")
        self.busy = os.path.join(self.path, "moe_jax_install.unfinished")

    def note(self):
        try:
            with open(os.path.join(self.path, NOTE)) as file:
                return json.load(file)
        except (OSError, ValueError):
            return {}

    def write_note(self, note):
        temporary = os.path.join(self.path, NOTE + ".new")
        with open(temporary, "w") as file:
            json.dump(note, file, indent=1, sort_keys=True)
        os.replace(temporary, os.path.join(self.path, NOTE))

    def version(self):
        """(3, 12) for a working Python with pip; None if there is no such thing."""
        try:
            answer = subprocess.run(
                [self.python, "-c", "import pip, sys; print(*sys.version_info[:2])"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=True,
            )
            return tuple(int(part) for part in answer.stdout.split())
        except (OSError, ValueError, subprocess.CalledProcessError):
            return None

    def wrong_with_it(self, python_was_named):
        """Why the environment cannot be used as it is; None if it can."""
        version = self.version()
        if os.path.exists(self.busy):
            return "an earlier installation did not finish"
        if version is None:
            return "its Python does not run"
        if version not in SUPPORTED:
            return "it is for Python %s" % spoken(version)
        if python_was_named and version != sys.version_info[:2]:
            return "it is for Python %s and PYTHON= names %s" % (spoken(version), spoken(sys.version_info[:2]))
        if self.note().get("checkout", CHECKOUT) != CHECKOUT:
            return "it belongs to the checkout %s" % self.note()["checkout"]
        return None

    def is_ours(self):
        return self.shown == ".venv" or bool(self.note()) or os.path.exists(self.busy)

    def remove(self, reason):
        if not self.is_ours():
            stop("%s was not made by this Makefile and cannot be used (%s); remove it or name another VENV=" % (self.shown, reason))
        say("Removing %s: %s." % (self.shown, reason))
        shutil.rmtree(self.path)

    def make(self):
        check_this_python()
        say("Making %s with Python %s (%s)." % (self.shown, spoken(sys.version_info[:3]), sys.executable))
        try:
            os.makedirs(self.path)
            open(self.busy, "w").close()
        except OSError as error:
            stop("cannot make %s (%s); name a folder that can be written: VENV=/path/to/venv" % (self.shown, error.strerror))
        if subprocess.run([sys.executable, "-m", "venv", self.path], check=False).returncode:
            stop("'%s -m venv %s' failed; what it said is above." % (sys.executable, self.shown))

    def install(self, extras):
        what = ".[%s]" % ",".join(extras) if extras else "."
        # The lock constrains both what is installed and what builds it (a relative path: pip splits this at spaces).
        environment = dict(
            os.environ, PIP_CONSTRAINT="requirements.lock", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_ROOT_USER_ACTION="ignore"
        )
        command = [self.python, "-m", "pip", "install", "-qq", "--no-input", "--use-pep517", "--editable", what]
        open(self.busy, "w").close()
        code = subprocess.run(command, cwd=CHECKOUT, env=environment, check=False).returncode
        if code >= 0:  # pip puts things back when it fails, not when it is killed
            os.remove(self.busy)
        if code:
            stop("installing failed; pip's reason is above. The same command tries again.")


@contextlib.contextmanager
def one_at_a_time():
    """Two makes in one checkout take turns."""
    try:
        import fcntl

        folder = os.open(CHECKOUT, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("Waiting for another installation in this checkout.")
        fcntl.flock(folder, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(folder)


def digest_of_inputs():
    digest = hashlib.sha256()
    for name in ("setup.py", "requirements.lock"):
        with open(os.path.join(CHECKOUT, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--venv", default=".venv")
    parser.add_argument("--extras", default="", help="comma-separated extras of setup.py")
    parser.add_argument("--accelerator", default="auto", help="one of " + ", ".join(ACCELERATORS))
    parser.add_argument("--python-was-named", action="store_true", help="make the environment again if it has another Python")
    options = parser.parse_args()
    if options.accelerator not in ACCELERATORS:
        stop("ACCELERATOR=%s is none of %s" % (options.accelerator, ", ".join(ACCELERATORS)))

    wanted = set(filter(None, options.extras.split(",")))
    accelerator = accelerator_of_this_machine() if options.accelerator == "auto" else options.accelerator
    if accelerator != "cpu":
        wanted.add(accelerator)

    with one_at_a_time():
        environment = Environment(options.venv)
        if os.path.lexists(environment.path):
            reason = environment.wrong_with_it(options.python_was_named)
            if reason:
                check_this_python()
                environment.remove(reason)
        note = environment.note()
        had = set(note.get("extras", ()))
        if note.get("digest") == digest_of_inputs() and wanted <= had:
            return
        if not os.path.lexists(environment.path):
            environment.make()
        elif note and note.get("digest") != digest_of_inputs():
            say("setup.py or requirements.lock has changed.")
        extras = sorted(wanted | had)
        if accelerator != "cpu" and options.accelerator == "auto":
            say("This machine has a %s (ACCELERATOR=cpu goes without)." % ("TPU" if accelerator == "tpu" else "NVIDIA GPU"))
        large = "with TensorFlow and libtpu, 1 GB to download; a few minutes" if "data" in extras else "JAX and what training needs, 250 MB; about a minute"
        say("Installing moe_jax%s from requirements.lock (%s) ..." % ("[%s]" % ",".join(extras) if extras else "", large))
        start = time.time()
        environment.install(extras)
        environment.write_note({"checkout": CHECKOUT, "digest": digest_of_inputs(), "extras": extras})
        say("Installed in %.0f s." % (time.time() - start))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted; the same command starts again.")
