"""Becomes a run: sets its limits, its user and its folder, then executes the program in its own place.

    python -I -S run_limited.py [--memory BYTES] [--processor SECONDS] [--files COUNT] [--user NAME] [--directory PATH]
        -- PROGRAM [ARGUMENT...]

The launcher starts jobs that ask for such things through this, in a process of its own: what cannot be done ends with
one line on standard error, that begins with FAULT, and exit status 127, as shells have it. Nothing is imported but the
standard library, and none of the site's packages, so it costs some 10 ms.

Memory is what a process may have of its own (RLIMIT_DATA; where the system is not Linux, all that it may map,
RLIMIT_AS). At the end of its processor time a process gets SIGXCPU, one second later SIGKILL. The folder is entered as
the user that the run belongs to.
"""

from __future__ import annotations

import math
import os
import sys

FAULT = "could not start "
NOT_STARTED_STATUS = 127


class Impossible(Exception):
    """Something that the job asks for cannot be had; one line for people."""


def parse(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options and the program with its arguments."""
    end = arguments.index("--")
    options = arguments[:end]
    return {name.removeprefix("--"): value for name, value in zip(options[::2], options[1::2], strict=True)}, arguments[
        end + 1 :
    ]


def limit(options: dict[str, str]) -> None:
    """Sets what each process of the run may use."""
    import resource

    memory = resource.RLIMIT_DATA if sys.platform == "linux" else resource.RLIMIT_AS
    for name, which, extra in (
        ("memory", memory, 0),
        ("processor", resource.RLIMIT_CPU, 1),
        ("files", resource.RLIMIT_NOFILE, 0),
    ):
        if name in options:
            most = math.ceil(float(options[name])) if which == resource.RLIMIT_CPU else int(options[name])
            try:
                resource.setrlimit(which, (most, most + extra))
            except (ValueError, OSError) as error:
                raise Impossible(f"its limit of {name} cannot be {options[name]}: {error}") from None


def become(name: str) -> None:
    """Gives the process to a user, with all groups of that user."""
    import pwd

    try:
        user = pwd.getpwnam(name)
    except KeyError:
        raise Impossible(f"there is no user {name!r} on this machine") from None
    if user.pw_uid != os.geteuid() or os.geteuid() == 0:
        try:
            os.initgroups(name, user.pw_gid)
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
        except PermissionError:
            raise Impossible(
                f"this worker may not act as user {name!r}; that takes a worker that runs as root"
            ) from None
    for variable, value in (("HOME", user.pw_dir), ("USER", name), ("LOGNAME", name), ("SHELL", user.pw_shell)):
        os.environ.setdefault(variable, value)


def prepare(options: dict[str, str]) -> None:
    """Everything before the program. Raises Impossible."""
    limit(options)
    if "user" in options:
        become(options["user"])
    if "directory" in options:
        try:
            os.chdir(options["directory"])
        except OSError as error:
            raise Impossible(f"its folder {options['directory']!r} cannot be used: {error.strerror}") from None
        os.environ["PWD"] = os.getcwd()


def main(arguments: list[str]) -> int:
    """Returns only when the program could not be started."""
    options, command = parse(arguments)
    try:
        prepare(options)
        os.execvpe(command[0], command, os.environ)
    except Impossible as error:
        reason = str(error)
    except OSError as error:
        reason = error.strerror or str(error)
    sys.stderr.write(f"{FAULT}{command[0]!r}: {reason}\n")
    return NOT_STARTED_STATUS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
