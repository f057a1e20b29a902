"""Starts a tool in an environment of its own, on a machine that has nothing but Python 3.11.

Standard library only, and nothing that an older Python cannot parse: it must be able to say that it is too old.

Environments live outside the checkout, under `${XDG_CACHE_HOME:-~/.cache}/coordinator/environments`. The name
of one holds a digest of everything that it is made from, so a changed source or lock file gives another environment and
an unchanged one is used again. The stamp is written last: a directory without it is half made (a power cut, Ctrl-C)
and is made again. The package is built from a copy, because a build leaves files beside what it builds.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator  # noqa: UP035  (the newer place is unknown to the Pythons this has to warn)

PYTHON_MIN = (3, 11)
STAMP_NAME = "complete"
UNUSED_DAYS_MAX = 14
"""Environments that no tool has used for so long are removed when a new one is made."""
SOURCE_FILES = ("pyproject.toml", "README.md", "LICENSE")
SOURCE_DIRECTORIES = ("coordinator", "worker_agent")


class BootstrapError(Exception):
    """The environment cannot be made; one line for people."""


@dataclass(frozen=True)
class Tool:
    """How one of the tools wants to be started."""

    module: str
    """Module under `tools/lib` whose `main(arguments) -> exit status` it is."""
    develop: bool = False
    """True to work on the checkout itself, with the packages of development."""
    installed_will_do: bool = False
    """True when a Python that already has the package is good enough."""


TOOLS = {
    "quickstart": Tool("quickstart_main"),
    "test": Tool("run_tests", develop=True),
    "generate": Tool("generate", develop=True),
    "bench": Tool("bench", develop=True),
    "lock": Tool("lock"),
    "node-join": Tool("node_join", installed_will_do=True),
    "node-leave": Tool("node_leave", installed_will_do=True),
}


def cache_directory() -> Path:
    """Where environments are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "coordinator" / "environments"


def source_files(root: Path) -> Iterator[Path]:
    """The files that the package is built from, in a fixed order."""
    for name in SOURCE_FILES:
        if (root / name).is_file():
            yield root / name
    for name in SOURCE_DIRECTORIES:
        for path in sorted((root / name).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def environment_name(root: Path, develop: bool) -> str:
    """Name of the environment: the same as long as what it is made from is the same."""
    digest = hashlib.sha256()
    for part in (sys.version, sys.platform, sys.executable):
        digest.update(part.encode() + b"\0")
    if develop:
        # The package itself is used in place, so only the list of what is installed counts.
        inputs = [root / "pyproject.toml", root / "requirements.lock"]
        digest.update(str(root).encode() + b"\0")
    else:
        inputs = [root / "requirements.lock", *source_files(root)]
    for path in inputs:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return ("develop-" if develop else "run-") + digest.hexdigest()[:16]


def python_of(environment: Path) -> Path:
    """The Python program of an environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes, so that two tools started at once make one environment."""
    with open(path, "a+b") as handle:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def checked(arguments: list[str], what: str) -> None:
    """Runs a program. Raises BootstrapError with the last thing that it said."""
    # What the caller's Python finds must not leak into the new environment.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("error")] or lines or ["no output"]
        raise BootstrapError(f"{what} failed (exit status {done.returncode}): {errors[-1]}")


def install(root: Path, environment: Path, develop: bool) -> None:
    """Makes the environment and installs the package with the versions of requirements.lock."""
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise BootstrapError(
                f"this Python ({sys.executable}) lacks the module {module}; on Debian: apt-get install python3-venv"
            )
    checked([sys.executable, "-m", "venv", str(environment)], "making a virtual environment")
    pip = [str(python_of(environment)), "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    pip += ["--constraint", str(root / "requirements.lock")]
    if develop:
        checked([*pip, "--editable", f"{root}[dev]"], "installing the packages of development")
        return
    with tempfile.TemporaryDirectory(prefix="coordinator-build-") as copy:
        for path in source_files(root):
            target = Path(copy) / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        checked([*pip, copy], "installing the package")


def remove_unused(directory: Path, keep: Path) -> None:
    """Removes environments that were not used for long, and those that were never finished."""
    oldest_s = time.time() - UNUSED_DAYS_MAX * 86_400
    for other in directory.iterdir():
        if other == keep or not other.is_dir():
            continue
        with contextlib.suppress(OSError):
            stamp = other / STAMP_NAME
            if (stamp if stamp.exists() else other).stat().st_mtime < oldest_s:
                shutil.rmtree(other)


def ensure_environment(
    root: Path,
    directory: Path,
    develop: bool = False,
    say: Callable[[str], None] = lambda line: None,
    make: Callable[[Path, Path, bool], None] = install,
) -> Path:
    """The environment for the sources at `root`, made if there is none yet. Raises BootstrapError."""
    environment = directory / environment_name(root, develop)
    stamp = environment / STAMP_NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory / (environment.name + ".lock")):
            if stamp.exists():
                os.utime(stamp)
                return environment
            if environment.exists():
                say(f"an earlier start left {environment} half made; making it again")
                shutil.rmtree(environment)
            say(f"making an environment, once per version, in {environment}")
            begun_s = time.monotonic()
            make(root, environment, develop)
            stamp.write_text(f"{sys.version}\n")
            say(f"made it in {time.monotonic() - begun_s:.0f} s")
            remove_unused(directory, keep=environment)
    except OSError as error:
        raise BootstrapError(
            f"cannot write {error.filename or directory}: {error.strerror}; "
            "set XDG_CACHE_HOME to a directory that can be written"
        ) from None
    return environment


def has_package() -> bool:
    """True when the Python that runs this has the package installed."""
    try:
        return importlib.util.find_spec("coordinator.cli.main") is not None
    except ImportError:
        return False


def run_here(name: str, arguments: list[str]) -> int:
    """Runs the tool in this process, which has the package."""
    root = Path(__file__).resolve().parents[2]
    # At the end: the installed package comes before the checkout's, the tools are found nevertheless.
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).resolve().parent)] + [str(root)]
    module = importlib.import_module(f"tools.lib.{TOOLS[name].module}")
    return int(module.main(arguments) or 0)


def main(arguments: list[str]) -> int:
    """`bootstrap.py TOOL ARGUMENTS...`: starts the tool in its environment; the exit status is the tool's."""
    if sys.version_info < PYTHON_MIN:
        wanted, found = ".".join(map(str, PYTHON_MIN)), ".".join(map(str, sys.version_info[:3]))
        print(f"tools: needs Python {wanted} or later; {sys.executable} is {found}", file=sys.stderr)
        return 1
    if arguments[:1] == ["--here"]:
        return run_here(arguments[1], arguments[2:])
    if not arguments or arguments[0] not in TOOLS:
        print(f"usage: bootstrap.py {{{','.join(TOOLS)}}} ARGUMENTS...", file=sys.stderr)
        return 2
    name, tool = arguments[0], TOOLS[arguments[0]]
    python = Path(sys.executable)
    if not (tool.installed_will_do and has_package()):
        try:
            root = Path(__file__).resolve().parents[2]
            environment = ensure_environment(
                root, cache_directory(), tool.develop, lambda line: print(f"tools/{name}: {line}", file=sys.stderr)
            )
        except BootstrapError as error:
            print(f"tools/{name}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
        python = python_of(environment)
    command = [str(python), "-B", str(Path(__file__).resolve()), "--here", *arguments]
    if os.name == "nt":
        return subprocess.call(command)
    sys.stderr.flush()
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
