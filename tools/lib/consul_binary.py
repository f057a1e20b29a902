"""Finds the program `consul`, or gets version 1.8.7 of it from Debian's suite bullseye: later releases carry no Consul.

How it is fetched stands in debian_package.py. Standard library only.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tools.lib import debian_package
from tools.lib.debian_package import Package, PackageError

CONSUL = Package("Consul", "consul", "1.8.7", "bullseye", program="consul", version_argument="version")
ConsulInstallError = PackageError


def find_consul() -> Path | None:
    """The program, from the PATH or from the cache; None where there is none. Starts nothing and changes nothing."""
    return debian_package.find(CONSUL)


def install_consul() -> Path:
    """The program, fetched into the cache if there is none yet. Raises ConsulInstallError."""
    return debian_package.install(CONSUL)


def main(arguments: list[str]) -> int:
    """Entry of `tools/install-consul`; prints the path. The exit status is 0, 1 (cannot be had) or 2 (usage)."""
    if arguments:
        print("usage: tools/install-consul   (no arguments: prints the path of the program)", file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        print(install_consul())
    except PackageError as error:
        print(f"tools/install-consul: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
