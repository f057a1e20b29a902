"""tools/lib/bootstrap.py: environments are keyed by what they are made from, and a half-made one is made again."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tools.lib import bootstrap
from tools.lib.lock import lock_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout."""
    root = tmp_path / "checkout"
    (root / "coordinator" / "__pycache__").mkdir(parents=True)
    (root / "pyproject.toml").write_text('[project]\nname = "small"\n')
    (root / "requirements.lock").write_text("one==1\n")
    (root / "coordinator" / "main.py").write_text("VALUE = 1\n")
    (root / "coordinator" / "__pycache__" / "main.pyc").write_bytes(b"\0")
    return root


def bare_environment(root: Path, environment: Path, develop: bool) -> None:
    """Makes a real virtual environment, without pip, which would need a registry."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)


def test_environment_is_used_again(checkout: Path, tmp_path: Path) -> None:
    """Shows that an unchanged checkout gets the environment that was made before, and that its Python runs."""
    made: list[Path] = []

    def make(root: Path, environment: Path, develop: bool) -> None:
        made.append(environment)
        bare_environment(root, environment, develop)

    first = bootstrap.ensure_environment(checkout, tmp_path / "cache", make=make)
    second = bootstrap.ensure_environment(checkout, tmp_path / "cache", make=make)
    assert first == second
    assert made == [first]
    done = subprocess.run([bootstrap.python_of(first), "-c", "print(6 * 7)"], stdout=subprocess.PIPE, check=True)
    assert done.stdout.strip() == b"42"


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements.lock", "coordinator/main.py"])
def test_each_input_changes_the_name(checkout: Path, name: str) -> None:
    """Shows that a change of the sources or of the lock asks for another environment."""
    before = bootstrap.environment_name(checkout, develop=False)
    (checkout / name).write_text("# changed\n")
    assert bootstrap.environment_name(checkout, develop=False) != before


def test_compiled_files_do_not_change_the_name(checkout: Path) -> None:
    """Shows that what Python leaves beside the sources does not ask for another environment."""
    before = bootstrap.environment_name(checkout, develop=False)
    (checkout / "coordinator" / "__pycache__" / "main.pyc").write_bytes(b"other")
    assert bootstrap.environment_name(checkout, develop=False) == before


def test_development_environment_ignores_sources(checkout: Path) -> None:
    """Shows that an edit of the sources keeps the environment of development, which uses them in place."""
    before = bootstrap.environment_name(checkout, develop=True)
    (checkout / "coordinator" / "main.py").write_text("VALUE = 2\n")
    assert bootstrap.environment_name(checkout, develop=True) == before


def test_half_made_environment_is_made_again(checkout: Path, tmp_path: Path) -> None:
    """Shows that an environment whose making was cut off is noticed, removed and made again."""
    said: list[str] = []

    def cut_off(root: Path, environment: Path, develop: bool) -> None:
        environment.mkdir()
        (environment / "left over").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bootstrap.ensure_environment(checkout, tmp_path / "cache", make=cut_off)
    made = bootstrap.ensure_environment(checkout, tmp_path / "cache", say=said.append, make=bare_environment)
    assert not (made / "left over").exists()
    assert bootstrap.python_of(made).exists()
    assert "half made" in said[0]


def test_two_starts_make_one_environment(checkout: Path, tmp_path: Path) -> None:
    """Shows that tools started at the same time do not make the same environment twice."""
    made: list[Path] = []

    def make(root: Path, environment: Path, develop: bool) -> None:
        made.append(environment)
        environment.mkdir()

    def start() -> None:
        bootstrap.ensure_environment(checkout, tmp_path / "cache", make=make)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_unused_environments_are_removed(checkout: Path, tmp_path: Path) -> None:
    """Shows that making a new environment removes those that nobody has used for long, and only those."""
    cache = tmp_path / "cache"
    for name, age_s in (("old", 40 * 86_400), ("recent", 60)):
        (cache / name).mkdir(parents=True)
        stamp = cache / name / bootstrap.STAMP_NAME
        stamp.touch()
        os.utime(stamp, (stamp.stat().st_mtime - age_s,) * 2)
    bootstrap.ensure_environment(checkout, cache, make=bare_environment)
    assert not (cache / "old").exists()
    assert (cache / "recent").exists()


def test_failed_installation_is_one_clear_line(tmp_path: Path) -> None:
    """Shows that a program that fails is reported with the last error that it printed."""
    script = "import sys; print('working'); print('ERROR: no such package: nosuch'); sys.exit(3)"
    with pytest.raises(bootstrap.BootstrapError, match=r"^installing failed \(exit status 3\): ERROR: no such package"):
        bootstrap.checked([sys.executable, "-c", script], "installing")


def test_unwritable_cache_is_one_clear_line(checkout: Path, tmp_path: Path) -> None:
    """Shows what a cache directory that cannot be made is answered with."""
    (tmp_path / "file").write_text("")
    with pytest.raises(bootstrap.BootstrapError, match="set XDG_CACHE_HOME"):
        bootstrap.ensure_environment(checkout, tmp_path / "file" / "cache", make=bare_environment)


def test_missing_python_is_one_clear_line(tmp_path: Path) -> None:
    """Shows that a machine without Python gets one line that says what to do, and exit status 1."""
    for program in ("dirname", "sh"):
        found = next(path for folder in ("/bin", "/usr/bin") if (path := Path(folder) / program).exists())
        (tmp_path / program).symlink_to(found)
    done = subprocess.run(
        [ROOT / "tools" / "quickstart"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "needs Python 3.11 or later" in done.stderr


def test_unknown_tool_is_a_usage_error() -> None:
    """Shows that a name that is no tool exits with 2 and lists the tools."""
    script = ROOT / "tools" / "lib" / "bootstrap.py"
    done = subprocess.run([sys.executable, script, "nosuch"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "quickstart" in done.stderr


def test_lock_has_plain_pins_only() -> None:
    """Shows that neither this project nor anything with a place of its own gets into the lock file."""
    own = ["fleet-coordinator @ file:///x", "fleet-coordinator==1"]
    frozen = ["# note", "-e /somewhere", "click==8.1.0", *own, "yarl==2"]
    text = lock_text("".join(f"{line}\n" for line in frozen))
    pins = [line for line in text.splitlines() if not line.startswith("#")]
    assert pins == ["click==8.1.0", "yarl==2"]


def test_the_lock_pins_every_dependency() -> None:
    """Shows that requirements.lock names a version for everything that pyproject.toml asks for."""
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[<>=!;\[ ]", line, maxsplit=1)[0].lower().replace("_", "-") for line in wanted}
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")}
    assert names <= pinned
