# SPDX-License-Identifier: Apache-2.0
"""The package: what its import costs, and what it offers."""

import subprocess
import sys
from pathlib import Path

import megatron_sp_fix

HEAVY = ("torch", "megatron", "inspect", "ast", "dataclasses", "logging", "argparse", "subprocess")


def test_import_is_light():
    code = f"import sys, megatron_sp_fix; print([m for m in {HEAVY} if m in sys.modules])"
    path = [str(Path(megatron_sp_fix.__file__).parents[1]), *sys.path]  # an editable install's, too
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path = {path!r}; {code}"]
    assert subprocess.check_output(command, text=True) == "[]\n"


def test_everything_public_is_there():
    wanted = {"apply", "remove", "applied", "status", "audit", "enable", "disable"}
    assert wanted <= set(megatron_sp_fix.__all__)
    for name in megatron_sp_fix.__all__:
        assert getattr(megatron_sp_fix, name).__doc__


def test_as_a_module():
    command = [sys.executable, "-m", "megatron_sp_fix", "--version"]
    text = subprocess.check_output(command, text=True)
    assert text == f"megatron-sp-fix {megatron_sp_fix.__version__}\n"
