# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/recipes.md that need no container engine and no weights, as they stand."""

import os
import re
import subprocess
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs/recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"\*Run by a test:\*\n\n```\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_command(environment, number):
    folder = os.path.dirname(environment.python)
    variables = {**environment.variables, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", BLOCKS[number]],
        env=variables,
        cwd=environment.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_other_command_says_what_it_was_checked_against():
    for section in TEXT.split("\n## ")[1:]:
        if "\n```\n" in re.sub(r"\*Run by a test:\*\n\n```\n.*?```", "", section, flags=re.S):
            assert "Checked" in section or section.startswith("On your own cluster"), section[:40]
