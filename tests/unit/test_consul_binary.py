"""Where the mirror for Consul comes from, and what is said when there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.lib.consul_binary import ConsulInstallError, find_consul, install_consul, main
from tools.lib.debian_package import machine_sources, parse_deb822, parse_one_line

DEB822 = """\
# A comment.
Types: deb deb-src
URIs: http://mirror.example/debian https://other.example/debian
Suites: trixie trixie-updates
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBGPL0BUBEADmW5NdOOHwPIJlgPu6JDcKw/NZJPR8lsD3K87ZM18gzyQZJD+w
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb
URIs: http://security.example/debian-security
Suites: trixie-security
Components: main
Enabled: yes

Types: deb
URIs: http://disabled.example/debian
Suites: trixie
Components: main
Enabled: no
"""

ONE_LINE = """\
# deb http://commented.example/debian trixie main
deb-src http://source.example/debian trixie main
deb [arch=amd64 signed-by=/etc/keys/vendor.gpg] https://vendor.example/apt stable vendor
deb [trusted=yes] http://mirror.example/debian/ trixie main contrib # near us
deb http://mirror.example/debian trixie-updates main
"""


def test_deb822_sources() -> None:
    """Stanzas give one source per address, with a key that stands in the stanza; disabled ones give none."""
    sources = parse_deb822(DEB822)
    assert [source.uri for source in sources] == [
        "http://mirror.example/debian",
        "https://other.example/debian",
        "http://security.example/debian-security",
    ]
    assert sources[0].signed_by.startswith("-----BEGIN")
    assert sources[0].signed_by.splitlines()[1] == "."
    assert [source.may_be_debian for source in sources] == [True, True, False]


def test_one_line_sources() -> None:
    """Lines give their options; what is no binary archive, or not Debian's main one, is left out."""
    sources = parse_one_line(ONE_LINE)
    assert [(source.uri, source.signed_by, source.trusted) for source in sources] == [
        ("https://vendor.example/apt", "/etc/keys/vendor.gpg", False),
        ("http://mirror.example/debian/", "", True),
        ("http://mirror.example/debian", "", False),
    ]
    assert [source.may_be_debian for source in sources] == [False, True, False]


def test_machine_sources_are_read_once_each(tmp_path: Path) -> None:
    """Both formats are read, files with other endings are not, and a mirror that is named twice counts once."""
    (tmp_path / "sources.list").write_text(ONE_LINE)
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "debian.sources").write_text(DEB822)
    (tmp_path / "sources.list.d" / "old.list.disabled").write_text("deb http://old.example/debian trixie main\n")
    uris = [source.uri for source in machine_sources(tmp_path)]
    assert uris == ["http://mirror.example/debian/", "https://other.example/debian"]
    assert machine_sources(tmp_path / "nothing") == []


def test_consul_is_found_on_the_path_and_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Consul on the PATH comes first, then the one in the cache; otherwise there is none."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert find_consul() is None
    cached = tmp_path / "cache" / "coordinator" / "consul-1.8.7" / "usr" / "bin" / "consul"
    on_path = tmp_path / "bin" / "consul"
    for program in (cached, on_path):
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        os.chmod(program, 0o755)
        assert find_consul() == program
        assert install_consul() == program


def test_without_apt_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine without apt the tool fails in one line, and writes nothing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ConsulInstallError):
        install_consul()
    assert main([]) == 1
    said = capsys.readouterr().err
    assert said == "tools/install-consul: there is no apt-get here; install Consul yourself and put it on the PATH\n"
    assert not (tmp_path / "cache").exists()
