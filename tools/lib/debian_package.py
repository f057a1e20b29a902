"""Programs out of Debian packages, unpacked into a cache: nothing is installed, no root is needed, apt stays as it is.

The mirrors that a Debian machine already uses serve older and newer releases than its own too, signed by keys that it
already trusts. So the mirror is read from the machine's sources, apt runs with a configuration, lists and a cache of
its own in a scratch directory, and the package is unpacked below `${XDG_CACHE_HOME:-~/.cache}/coordinator`. The
directory gets its final name last, so whatever is there under that name is whole. Standard library only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

APT_DIRECTORY = Path("/etc/apt")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
COMMAND_TIMEOUT_S = 300.0

APT_CONFIGURATION = """\
Dir::Etc::SourceList "{scratch}/sources.list";
Dir::Etc::SourceParts "-";
Dir::State "{scratch}/state";
Dir::State::Lists "{scratch}/state/lists";
Dir::State::status "{scratch}/state/status";
Dir::Cache "{scratch}/cache";
APT::Sandbox::User "";
Acquire::Languages "none";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""
"""Read after the machine's own configuration, so its proxies stay and its hooks, which may touch its caches, do not."""


class PackageError(Exception):
    """A program cannot be had; one line for people."""


@dataclass(frozen=True)
class Package:
    """A program in a Debian package."""

    title: str
    """For people, for example "Consul"."""
    name: str
    """Of the package."""
    version: str
    suite: str
    """The release of Debian that has it."""
    program: str
    """Its name, in /usr/bin of the package."""
    version_argument: str
    """What makes the program tell its version."""
    epoch: str = ""
    """Debian's own number before the version, for example "5:"."""
    libraries: tuple[str, ...] = ()
    """Further packages that the program needs and that a machine may lack, of the same release; unpacked beside it."""

    @property
    def directory(self) -> Path:
        """Where it is kept, unpacked."""
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        return Path(base) / "coordinator" / f"{self.program}-{self.version}"

    @property
    def cached(self) -> Path:
        """Where the program is once it is in the cache."""
        return self.directory / "usr" / "bin" / self.program

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the program needs to find its libraries."""
        return _environment(self.directory)


def find(package: Package) -> Path | None:
    """The program, from the PATH or from the cache; None where there is none. Starts nothing and changes nothing."""
    on_path = shutil.which(package.program)
    if on_path:
        return Path(on_path)
    return package.cached if os.access(package.cached, os.X_OK) else None


def install(package: Package) -> Path:
    """The program, fetched into the cache if there is none yet. Raises PackageError."""
    found = find(package)
    if found is not None:
        return found
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise PackageError(f"there is no {program} here; install {package.title} yourself and put it on the PATH")
    sources = machine_sources()
    if not sources:
        raise PackageError(f"no Debian mirror in the sources of {APT_DIRECTORY}; put `{package.program}` on the PATH")
    target = package.directory
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            _fetch(package, sources, Path(scratch))
            # Two installations at once are harmless: the second finds the name taken and leaves its copy behind.
            if not target.exists():
                os.rename(Path(scratch) / "package", target)
    except OSError as error:
        where = error.filename or target
        raise PackageError(f"cannot write {where}: {error.strerror}; set XDG_CACHE_HOME") from None
    return package.cached


@dataclass(frozen=True)
class AptSource:
    """One mirror of the machine."""

    uri: str
    signed_by: str = ""
    """Path of a keyring, fingerprints, or a whole key with line breaks; empty where apt's own keys decide."""
    trusted: bool = False
    suites: tuple[str, ...] = ()
    components: tuple[str, ...] = ()

    @property
    def may_be_debian(self) -> bool:
        """True for a source that looks like Debian's main archive; its updates and security archives are not."""
        special = any(re.search(r"-(security|updates|backports|proposed)|/", suite) for suite in self.suites)
        return "main" in self.components and (not special or len(self.suites) > 1)


def parse_one_line(text: str) -> list[AptSource]:
    """The sources of a file in the one-line format (`deb [options] uri suite components...`)."""
    sources = []
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)([^#]*)", line)
        if match:
            options = dict(part.split("=", 1) for part in (match[1] or "").split() if "=" in part)
            sources.append(
                AptSource(
                    uri=match[2],
                    signed_by=options.get("signed-by", ""),
                    trusted=options.get("trusted") == "yes",
                    suites=(match[3],),
                    components=tuple(match[4].split()),
                )
            )
    return sources


def parse_deb822(text: str) -> list[AptSource]:
    """The sources of a file in the deb822 format (stanzas of `Field: value`)."""
    sources = []
    for stanza in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t") and name:
                fields[name] += "\n" + line.strip()
            elif ":" in line:
                name, value = line.split(":", 1)
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        sources += [
            AptSource(
                uri=uri,
                signed_by=fields.get("signed-by", "").strip(),
                trusted=fields.get("trusted", "").lower() == "yes",
                suites=tuple(fields.get("suites", "").split()),
                components=tuple(fields.get("components", "").split()),
            )
            for uri in fields.get("uris", "").split()
        ]
    return sources


def machine_sources(directory: Path = APT_DIRECTORY) -> list[AptSource]:
    """The machine's mirrors that may be Debian's main archive, the likeliest first, each once."""
    found: list[AptSource] = []
    for path in [directory / "sources.list", *sorted((directory / "sources.list.d").glob("*"))]:
        if path.suffix in (".list", ".sources") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            found += parse_deb822(text) if path.suffix == ".sources" else parse_one_line(text)
    once: dict[str, AptSource] = {}
    for source in found:
        if source.may_be_debian:
            once.setdefault(source.uri.rstrip("/"), source)
    return sorted(once.values(), key=lambda source: not source.uri.rstrip("/").endswith("/debian"))


def _fetch(package: Package, sources: list[AptSource], scratch: Path) -> None:
    """Leaves the unpacked package in `scratch/package`, from the first source that has it."""
    failure = PackageError("nothing was tried")
    for source in sources:
        try:
            _download(package, source, scratch)
            break
        except PackageError as error:
            failure = error
    else:
        wanted = f"{package.title} {package.version} ({package.suite})"
        raise PackageError(f"no mirror of this machine gave {wanted}: {failure}")
    for archive in sorted(scratch.glob("*.deb")):
        _run(["dpkg", "-x", str(archive), str(scratch / "package")], scratch)
    binary = scratch / "package" / "usr" / "bin" / package.program
    said = _run([str(binary), package.version_argument], scratch, _environment(scratch / "package"))
    if package.version not in said:
        raise PackageError(f"expected {package.title} {package.version}, the package holds {said.splitlines()[:1]}")


def _environment(unpacked: Path) -> dict[str, str]:
    """What lets programs find the libraries that were unpacked beside them."""
    found = sorted({str(path.parent) for path in unpacked.glob("usr/lib/**/*.so*")})
    return {"LD_LIBRARY_PATH": ":".join(found)} if found else {}


def _download(package: Package, source: AptSource, scratch: Path) -> None:
    """Leaves the package's archive in `scratch`."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (scratch / name).mkdir(parents=True, exist_ok=True)
    (scratch / "state" / "status").touch()
    signed_by = source.signed_by or (str(KEYRING) if KEYRING.is_file() else "")
    if "-----BEGIN" in signed_by:
        # A key written into the stanza: an empty line stands there as a single dot.
        key = scratch / "key.asc"
        key.write_text("\n".join("" if line == "." else line for line in signed_by.splitlines()) + "\n")
        signed_by = str(key)
    options = [f"signed-by={','.join(signed_by.split())}"] if signed_by else []
    options += ["trusted=yes"] if source.trusted else []
    brackets = f"[{' '.join(options)}] " if options else ""
    (scratch / "sources.list").write_text(f"deb {brackets}{source.uri} {package.suite} main\n")
    (scratch / "apt.conf").write_text(APT_CONFIGURATION.format(scratch=scratch))
    apt = ["apt-get", "-c", str(scratch / "apt.conf"), "-q"]
    _run([*apt, "-o", "APT::Update::Error-Mode=any", "update"], scratch)
    _run([*apt, "download", f"{package.name}={package.epoch}{package.version}*", *package.libraries], scratch)


def _run(arguments: list[str], directory: Path, environment: Mapping[str, str] | None = None) -> str:
    """What the program said. Raises PackageError with the line that tells the fault."""
    name = " ".join([Path(arguments[0]).name, arguments[-1]]) if arguments[0] == "apt-get" else Path(arguments[0]).name
    try:
        done = subprocess.run(
            arguments,
            cwd=directory,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PackageError(f"{name} did not end within {COMMAND_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith(("E:", "Err:", "W:"))] or lines or ["no output"]
        raise PackageError(f"{name} failed: {told[0]}")
    return done.stdout
