# SPDX-License-Identifier: Apache-2.0
"""The demonstration: by itself, and under torchrun."""

import os
import subprocess
import sys

import pytest
import torch

OURS = ["-m", "megatron_sp_fix", "demo"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU does not make two ranks")
@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["alone", "torchrun"])
def test_demo(request, launcher):
    if request.config.getoption("--unpatched"):
        pytest.fail("the demonstration applies the fix by itself")
    done = subprocess.run(
        [sys.executable, *launcher, *OURS],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("every patched row holds, on every rank") == 1
    assert "GPTModel: plain LM" in done.stderr
