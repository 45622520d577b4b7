# SPDX-License-Identifier: Apache-2.0
"""Give the import hook of hook.py to a command, or to every process of an environment."""

import os
import sysconfig
from pathlib import Path

# `site` runs the second line as Python starts. It does nothing once the package is uninstalled.
_PTH = """# Written by `megatron-sp-fix enable`; `megatron-sp-fix disable` removes it.
import os, sys; p = {!r}; os.path.isdir(p) and sys.path.insert(0, p)
"""


class StartupError(RuntimeError):
    """A command cannot be started, or an environment not be changed; the message says why."""


def folder() -> str:
    """The folder whose ``sitecustomize.py`` installs the import hook, for ``PYTHONPATH``."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "bootstrap")


def enable() -> str:
    """Let every Python process of this environment patch megatron-core; returns the file it wrote.

    Raises:
        StartupError: the file cannot be written into site-packages.
    """
    file = Path(sysconfig.get_path("purelib"), "megatron_sp_fix.pth")
    try:
        file.write_text(_PTH.format(folder()), encoding="utf-8")
    except OSError as error:
        raise StartupError(f"{error}; enable it as the owner of that folder") from error
    return str(file)


def disable() -> str:
    """Remove what :func:`enable` wrote; returns the file, or an empty string if there was none.

    Raises:
        StartupError: the file cannot be removed.
    """
    file = Path(sysconfig.get_path("purelib"), "megatron_sp_fix.pth")
    try:
        file.unlink()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise StartupError(f"{error}; disable it as the owner of that folder") from error
    return str(file)
