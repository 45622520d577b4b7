# SPDX-License-Identifier: Apache-2.0
"""Start a command, or every process of an environment, with the import hook of hook.py."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["StartupError", "disable", "enable", "folder", "run"]

_MARK = "# Written by `megatron-sp-fix enable`; `megatron-sp-fix disable` removes it."
# `site` runs such a line as Python starts. It does nothing once the package is uninstalled.
_LINE = "import os, sys; p = {!r}; p in sys.path or os.path.isdir(p) and sys.path.insert(0, p)"


class StartupError(RuntimeError):
    """A command cannot be started, or an environment not be changed; the message says why."""


def folder() -> str:
    """The folder whose ``sitecustomize.py`` installs the import hook, for ``PYTHONPATH``."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "bootstrap")


def run(command: Sequence[str], also: Sequence[str] = ()) -> NoReturn:
    """Become a command whose Python processes patch megatron-core as they import it.

    Args:
        command: a program and its arguments. A script ``*.py`` or ``-m`` and a module are run by
            this Python, with the options that it was given itself.
        also: as of ``apply``, for these processes.

    Raises:
        StartupError: there is no such program, or this Python ignores ``PYTHONPATH``.
    """
    command = list(command)
    if command[0] == "-m" or command[0].endswith(".py"):
        if sys.flags.ignore_environment or sys.flags.no_site:
            raise StartupError("run needs PYTHONPATH and site: start python without -I, -E and -S")
        options = sys.orig_argv[1 : -len(sys.argv)]  # and "-m", of `python -m megatron_sp_fix`
        command = [sys.executable, *(options[:-1] if options[-1:] == ["-m"] else options), *command]
    path = [folder(), *filter(None, [os.environ.get("PYTHONPATH")])]
    names = [*filter(None, [os.environ.get("MEGATRON_SP_FIX_ALSO")]), *also]
    changes = {"PYTHONPATH": os.pathsep.join(path), "MEGATRON_SP_FIX_ALSO": ",".join(names)}
    try:
        os.execvpe(command[0], command, {**os.environ, **changes})
    except OSError as error:
        raise StartupError(f"cannot run {command[0]}: {error.strerror}") from error


def enable() -> str:
    """Let every Python process of this environment patch megatron-core as it imports it.

    Returns:
        str: the file that was written into site-packages, one line long.

    Raises:
        StartupError: the folder cannot be written, or has somebody else's file of that name.
    """
    try:
        file = _file()
        with open(file, "w", encoding="utf-8") as stream:
            stream.write(f"{_MARK}\n{_LINE.format(folder())}\n")
    except OSError as error:
        raise StartupError(f"{error}; enable it as the owner of that folder") from error
    return file


def disable() -> str:
    """Remove what :func:`enable` wrote; returns the file, or an empty string if there was none.

    Raises:
        StartupError: the file cannot be removed, or is somebody else's.
    """
    try:
        file = _file()
        os.unlink(file)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise StartupError(f"{error}; disable it as the owner of that folder") from error
    return file


def _file() -> str:
    import sysconfig

    file = os.path.join(sysconfig.get_path("purelib"), "megatron_sp_fix.pth")
    if os.path.exists(file):
        with open(file, encoding="utf-8", errors="replace") as stream:
            if "megatron-sp-fix" not in stream.readline():
                raise StartupError(f"{file} is not megatron-sp-fix's and is left: move it away")
    return file
