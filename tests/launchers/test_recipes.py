# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/recipes.md that need no container engine and no weights, as they stand."""

import os
import re
import subprocess
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs/recipes.md").read_text(encoding="utf-8")
#: What stands between the block before and this one, and the block.
BLOCKS = re.findall(r"(.*?)\n```(\w*)\n(.*?)```\n", TEXT, re.S)
COMMANDS = [block for before, language, block in BLOCKS if "*Run by a test" in before]


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_command(environment, number):
    folder = os.path.dirname(environment.python)
    script = Path(folder, "megatron-sp-fix")
    script.write_text(f'#!/bin/sh\nexec {environment.python} -m megatron_sp_fix "$@"\n')
    script.chmod(0o755)
    done = subprocess.run(
        ["bash", "-euc", COMMANDS[number]],
        env={**environment.variables, "PATH": f"{folder}:{os.environ['PATH']}"},
        cwd=environment.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_other_command_is_marked_as_read():
    assert len(COMMANDS) == 3
    for before, language, block in BLOCKS:
        assert language or block in COMMANDS or re.search("read, not run", before, re.I), block
