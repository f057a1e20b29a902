"""Makes the typed Python code of the API from proto/; `--check` says whether the committed code is up to date."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = Path("coordinator/api/v1")
"""Where generated files land: the path of the protobuf package, so that imports need no patching."""


def generate(root: Path, output: Path) -> None:
    """Writes the code of every file in `root`/proto below `output`. Raises CalledProcessError."""
    protos = sorted((root / "proto").rglob("*.proto"))
    if not protos:
        raise FileNotFoundError(f"no .proto file below {root / 'proto'}")
    # protoc finds the plugins of mypy-protobuf beside the Python that runs this.
    folder, suffix = Path(sys.executable).parent, ".exe" if sys.platform == "win32" else ""
    plugins = [f"--plugin=protoc-gen-{name}={folder / f'protoc-gen-{name}{suffix}'}" for name in ("mypy", "mypy_grpc")]
    kinds = [f"--python_out={output}", f"--grpc_python_out={output}"]
    kinds += [f"--mypy_out=quiet:{output}", f"--mypy_grpc_out=quiet:{output}"]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{root / 'proto'}", *plugins, *kinds, *map(str, protos)],
        check=True,
    )
    for proto in protos:
        if not any(line.startswith("service ") for line in proto.read_text().splitlines()):
            # Nothing to call in it: what the plugins write for it is an empty shell.
            for ending in ("_pb2_grpc.py", "_pb2_grpc.pyi"):
                relative = proto.relative_to(root / "proto")
                (output / relative.with_name(relative.stem + ending)).unlink(missing_ok=True)


def read_generated(root: Path) -> dict[str, bytes]:
    """Contents of the generated files below `root`, by name."""
    return {path.name: path.read_bytes() for path in (root / GENERATED).glob("*_pb2*.py*") if path.is_file()}


def differences(committed: dict[str, bytes], fresh: dict[str, bytes]) -> list[str]:
    """One line per file that is not as it would be made."""
    lines = [f"{name}: missing; proto/ asks for it" for name in sorted(fresh.keys() - committed.keys())]
    lines += [f"{name}: nothing in proto/ makes it any more" for name in sorted(committed.keys() - fresh.keys())]
    lines += [f"{name}: differs" for name in sorted(fresh.keys() & committed.keys()) if fresh[name] != committed[name]]
    return lines


def main(arguments: list[str]) -> int:
    """Entry of `tools/generate`: 0 when all is as it should be, 1 when the check found a difference."""
    parser = argparse.ArgumentParser(prog="tools/generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 and name the files that differ")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="coordinator-generate-") as scratch:
        try:
            generate(ROOT, Path(scratch))
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            print(f"tools/generate: {error}", file=sys.stderr)
            return 1
        fresh, committed = read_generated(Path(scratch)), read_generated(ROOT)
    found = differences(committed, fresh)
    if options.check:
        for line in found:
            print(f"{GENERATED.as_posix()}/{line}; run tools/generate", file=sys.stderr)
        print(f"{GENERATED.as_posix()}: {len(fresh)} generated files, {len(found)} differ from proto/")
        return 1 if found else 0
    for name in committed.keys() - fresh.keys():
        (ROOT / GENERATED / name).unlink()
    for name, content in fresh.items():
        if committed.get(name) != content:
            (ROOT / GENERATED / name).write_bytes(content)
    print(f"{GENERATED.as_posix()}: {len(fresh)} files, {len(found)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
