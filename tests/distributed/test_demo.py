# SPDX-License-Identifier: Apache-2.0
"""The demonstration, and its ranks: those that do not answer, die or are left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from megatron_sp_fix import status
from megatron_sp_fix.demo import demo
from megatron_sp_fix.demo.ranks import RankError, Ranks

OURS = [sys.executable, "-m", "megatron_sp_fix", "demo"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU does not make two ranks")
def test_demo(request):
    if request.config.getoption("--unpatched"):
        pytest.fail("the demonstration applies the fix by itself")
    # As a job that ended in this shell may have left them: the demonstration has its own ranks.
    left_over = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "nowhere"}
    done = subprocess.run(
        [*OURS, "--json"],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **left_over},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = json.loads(done.stdout)
    assert shown["fixed"] is True
    native = {site.native for site in status().sites if site.name.startswith("GPTModel")}
    unpatched = "tower, unpatched" if native == {"no shard"} else "tower, own scatter"
    rows = [row for row in shown["rows"] if row["model"] == "GPTModel"]
    assert [row["run"] for row in rows] == ["plain LM", unpatched, "tower, fixed"]
    assert rows[0]["decoder input"] == rows[2]["decoder input"]


@pytest.mark.parametrize("tp", [-1, 0, 1, 100_000])
def test_a_size_out_of_range(tp):
    with pytest.raises(ValueError, match=rf"--tp {tp} does not fit: choose from 2 to \d+"):
        demo(tp)


def test_under_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ValueError, match="not under torchrun"):
        demo(2)


def stuck():
    if torch.distributed.get_rank() == 0:
        torch.distributed.barrier()


def fails_on_one():
    if torch.distributed.get_rank() == 1:
        raise KeyError("on one")
    torch.distributed.barrier()


def test_ranks_that_do_not_answer_and_that_died():
    with Ranks(2, tp=2) as ranks:
        before = ranks.run(os.getpid)  # they have imported what they need
        with pytest.raises(RankError, match=r"(?s)^rank 0: no answer in time\n.* in stuck\n"):
            ranks.run(stuck, timeout=5)
        after = ranks.run(os.getpid)
        assert not {*before} & {*after}, "not started anew"
        # The one that waits for it is not given the whole time.
        with pytest.raises(
            RankError, match=r"(?ms)^rank 0: no answer.*^rank 1: KeyError: 'on one'"
        ):
            ranks.run(fails_on_one, timeout=3600)
        psutil.Process(ranks.run(os.getpid)[1]).kill()
        with pytest.raises(RankError, match=r"^rank 1: the process died; out of memory"):
            ranks.run(torch.distributed.get_rank)
        assert ranks.run(torch.distributed.get_rank) == [0, 1]


LEFT_BEHIND = """
import os
import signal
import test_demo
from megatron_sp_fix.demo.ranks import Ranks

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    with Ranks(2, tp=2) as ranks:
        print(*ranks.run(os.getpid), flush=True)
        ranks.run(test_demo.stuck, timeout=3600)
"""


EARLY = """
import signal
import torch.distributed
from megatron_sp_fix.demo.ranks import Ranks

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Ranks(2, tp=2) as ranks:
        print("starts", flush=True)
        print(ranks.run(torch.distributed.get_rank), flush=True)
"""


def start(folder, code):
    """Run a script in a session of its own, as a terminal does, which finds this folder's tests."""
    (folder / "pool.py").write_text(code)
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, folder / "pool.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, "PYTHONPATH": path},
        start_new_session=True,
    )


def test_ctrl_c_while_the_ranks_start(tmp_path):
    with start(tmp_path, EARLY) as pool:
        assert pool.stdout.readline() == "starts\n"
        time.sleep(1.5)  # torch is being imported, which takes longer
        os.killpg(pool.pid, signal.SIGINT)
        out, error = pool.communicate(timeout=300)
    assert out == "" and error.count("Traceback") == error.count("KeyboardInterrupt") == 1, error


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_no_rank_outlives_the_pool(tmp_path, by):
    with start(tmp_path, LEFT_BEHIND) as pool:
        ranks = [psutil.Process(int(pid)) for pid in pool.stdout.readline().split()]
        time.sleep(1)  # one of them is stuck by now
        if by == signal.SIGINT:
            os.killpg(pool.pid, by)  # as a terminal sends Ctrl-C: to every process
        else:
            pool.send_signal(by)
        assert len(ranks) == 2
        left = psutil.wait_procs(ranks, timeout=60)[1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            pool.wait(60)
        pool.kill()
        assert left == []
        # A traceback of Ctrl-C is the pool's own, not each rank's.
        assert pool.stderr.read().count("Traceback") == (1 if by == signal.SIGINT else 0)
