# SPDX-License-Identifier: Apache-2.0
"""Give the import hook of hook.py to a command, or to every process of an environment."""

import os
import sysconfig
from pathlib import Path

#: Whose ``sitecustomize.py`` installs the import hook; for ``PYTHONPATH``.
FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bootstrap")
_NAME = "megatron_sp_fix_enabled.pth"  # not what somebody would call a path file of their own
# `site` runs the second line as Python starts. It does nothing once the package is uninstalled.
_PTH = """# Written by `megatron-sp-fix enable`; `megatron-sp-fix disable` removes it.
import os, sys; p = {!a}; os.path.isdir(p) and sys.path.insert(0, p)
"""


def enable() -> str:
    """Let every Python process of this environment patch megatron-core.

    Returns the file that was written into site-packages, or raises what `open` does.
    """
    file = Path(sysconfig.get_path("purelib"), _NAME)
    file.write_text(_PTH.format(FOLDER), encoding="utf-8")
    return str(file)


def disable() -> str:
    """Remove the file of :func:`enable`, and return its name, or "" if there was none."""
    file = Path(sysconfig.get_path("purelib"), _NAME)
    there = file.exists()
    file.unlink(missing_ok=True)
    return str(file) if there else ""
