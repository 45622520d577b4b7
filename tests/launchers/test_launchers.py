# SPDX-License-Identifier: Apache-2.0
"""Real launchers start somebody's job, unchanged: it fails by itself, and not with the fix."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

JOB = str(Path(__file__).with_name("job.py"))
# As mpirun starts processes: by what they are to run, with variables of its own.
MPIRUN = """
store=$(mktemp -u)
for rank in 0 1; do OMPI_COMM_WORLD_RANK=$rank "$@" "$store" & ranks="$ranks $!"; done
for rank in $ranks; do wait $rank || status=1; done
rm -f "$store"; exit $status
"""


def launch(environment, command, *, under=()):
    done = subprocess.run(
        [*under, *command],
        env=environment.variables,
        cwd=environment.folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def check_fails(status, text):
    assert status != 0
    # In one of the ways in which README says that it does.
    assert "shape mismatch: indexing" in text or "Sizes of tensors must match" in text, text


def check_passes(status, text, lines=None):
    assert status == 0, text
    for rank in (0, 1):
        assert f"rank {rank}: loss of 16 tokens" in text
    said = text.count("megatron-sp-fix: patched ")
    assert said == lines or (lines is None and said), text


@pytest.fixture
def commands(environment, torchrun):
    python = environment.python
    mpirun = ("sh", "-c", MPIRUN, "mpirun", python, JOB, "mpirun")
    return {
        "torchrun": (python, *torchrun, JOB, "torchrun"),
        "mpirun": mpirun,
        **{way: (python, JOB, way) for way in ("spawn", "fork", "ray")},
    }


# How many processes say that they patch: rank 0 alone where a variable names the ranks; each that
# imports megatron-core where none does.
@pytest.mark.parametrize(
    ("way", "lines"), [("torchrun", 1), ("mpirun", 1), ("spawn", 2), ("fork", 1), ("ray", None)]
)
def test_run(environment, commands, way, lines):
    if way == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("needs the extra `ray`")
    check_fails(*launch(environment, commands[way]))
    run = (environment.python, "-m", "megatron_sp_fix", "run")
    check_passes(*launch(environment, commands[way], under=run), lines)


def test_run_as_the_script_of_torchrun(environment, torchrun):
    command = (environment.python, *torchrun, "-m", "megatron_sp_fix", "run", JOB, "torchrun")
    check_passes(*launch(environment, command), 1)


def test_enable(environment, commands):
    enable = (environment.python, "-m", "megatron_sp_fix", "enable")
    assert launch(environment, enable)[0] == 0
    check_passes(*launch(environment, commands["spawn"]), 2)
