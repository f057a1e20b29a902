"""Makes requirements.lock again: what a clean environment resolves to today, the tools of development included."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.lib.bootstrap import python_of, source_files

HEADER = """\
# Every package that this project was tested with, tools of development included, as constraints for pip:
# `pip install -c requirements.lock .`. Made by `tools/lock`. Which are needed, and why: pyproject.toml, README.md.
"""
OWN_NAME = "fleet-coordinator"


def lock_text(frozen: str) -> str:
    """The lock file for an output of `pip freeze`: plain pins only, without this project itself."""
    pins = [line for line in frozen.splitlines() if "==" in line and not line.startswith(("#", "-"))]
    return HEADER + "".join(f"{pin}\n" for pin in pins if not pin.lower().startswith(OWN_NAME))


def main(arguments: list[str]) -> int:
    """Entry of `tools/lock`."""
    if arguments:
        print("usage: tools/lock   (no arguments: writes requirements.lock)", file=sys.stderr)
        return 2
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory(prefix="coordinator-lock-") as scratch:
        environment, copy = Path(scratch) / "environment", Path(scratch) / "copy"
        for path in source_files(root):
            target = copy / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        pip = [str(python_of(environment)), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "--no-input", f"{copy}[dev]"], check=True)
        frozen = subprocess.run([*pip, "freeze"], check=True, stdout=subprocess.PIPE, text=True).stdout
    (root / "requirements.lock").write_text(lock_text(frozen))
    print(f"requirements.lock: {len(lock_text(frozen).splitlines()) - 2} packages; run tools/test before committing it")
    return 0
