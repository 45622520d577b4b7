# SPDX-License-Identifier: Apache-2.0
"""A pool of ranks for the session (one a pytest-xdist worker)."""

import os

import pytest
import torch

from megatron_sp_fix.ranks import Ranks


@pytest.fixture(scope="session")
def pool():
    gpus = torch.cuda.device_count()
    shared = os.environ.get("SHARE_GPU") == "1"
    with Ranks(min(gpus, 4) if gpus and not shared else 4) as ranks:
        yield ranks


@pytest.fixture
def run(pool):
    """Run a function on ranks, `tp` of them unless more are named; NCCL where GPUs suffice."""

    def call(function, *args, ranks=0, **layout):
        ranks = ranks or layout.get("tp", 1)
        if ranks > pool.size:
            pytest.skip(f"needs {ranks} GPUs, found {pool.size}")
        return pool.run(function, *args, ranks=ranks, **layout)

    return call
