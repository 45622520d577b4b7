# SPDX-License-Identifier: Apache-2.0
"""The demonstration, by itself and under torchrun; and ranks that do not answer."""

import os
import subprocess
import sys

import psutil
import pytest
import torch

from megatron_sp_fix.ranks import RankError, Ranks

OURS = ["-m", "megatron_sp_fix", "demo"]


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU does not make two ranks")
@pytest.mark.parametrize("launcher", ["alone", "torchrun"])
def test_demo(request, torchrun, launcher):
    if request.config.getoption("--unpatched"):
        pytest.fail("the demonstration applies the fix by itself")
    done = subprocess.run(
        [sys.executable, *(torchrun if launcher == "torchrun" else ()), *OURS],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("every patched row holds, on every rank") == 1
    assert "GPTModel: plain LM" in done.stderr


def stuck():
    if torch.distributed.get_rank() == 0:
        torch.distributed.barrier()


def test_a_rank_that_does_not_answer_and_one_that_died():
    with Ranks(2) as ranks:
        before = ranks.run(os.getpid, tp=2)  # they have imported what they need
        with pytest.raises(RankError, match=r"(?s)^rank 0 of 2: no answer after 5 s.* in stuck\n"):
            ranks.run(stuck, tp=2, timeout=5)
        after = ranks.run(os.getpid, tp=2)
        assert not {*before} & {*after}, "not started anew"
        process = psutil.Process(after[1])
        process.kill()
        process.wait(10)
        assert ranks.run(os.getpid, ranks=1, tp=1) and ranks.run(os.getpid, tp=2)
