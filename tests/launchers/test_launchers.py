# SPDX-License-Identifier: Apache-2.0
"""Real launchers start somebody's job, unchanged: it fails by itself, and not with the fix."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

JOB = Path(__file__).with_name("job.py")


def launch(environment, *command):
    done = subprocess.run(
        [environment.python, *command],
        env=environment.variables,
        cwd=environment.folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done, done.stdout + done.stderr


def check_fails(done, text):
    assert done.returncode != 0
    # In one of the ways in which README says that it does.
    assert "shape mismatch: indexing" in text or "Sizes of tensors must match" in text, text


def check_passes(done, text):
    assert done.returncode == 0, text
    for rank in (0, 1):
        assert f"rank {rank}: loss of 16 tokens" in text


@pytest.mark.parametrize("way", ["torchrun", "spawn", "fork", "ray"])
def test_enabled_for_every_process(environment, torchrun, way):
    if way == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("needs the extra `ray`")
    job = (*(torchrun if way == "torchrun" else ()), str(JOB), way)
    check_fails(*launch(environment, *job))
    done, text = launch(environment, "-m", "megatron_sp_fix", "enable")
    assert done.returncode == 0, text
    check_passes(*launch(environment, *job))
    environment.variables["MEGATRON_SP_FIX"] = "0"
    if way == "spawn":
        check_fails(*launch(environment, *job))


def test_run_under_torchrun(environment, torchrun):
    check_passes(
        *launch(environment, *torchrun, "-m", "megatron_sp_fix", "run", str(JOB), "torchrun")
    )


def test_run_reaches_forked_processes(environment):
    check_passes(*launch(environment, "-m", "megatron_sp_fix", "run", str(JOB), "fork"))
