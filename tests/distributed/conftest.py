# SPDX-License-Identifier: Apache-2.0
"""Tests that run on ranks: a pool of them for the session (one a pytest-xdist worker)."""

import math
import os

import onrank
import pytest
import torch

from megatron_sp_fix.demo.ranks import RankError, Ranks


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "on_ranks(tp=1, pp=1, cp=1, ep=1, vpp=None, ranks=None, timeout=120): run the test on "
        "every rank; `tp` is that of the test's argument, if it has one; arguments are pickled",
    )


def pytest_itemcollected(item):
    if item.get_closest_marker("on_ranks") and "run" not in item.fixturenames:
        item.fixturenames.append("run")


def pytest_pyfunc_call(pyfuncitem):
    mark = pyfuncitem.get_closest_marker("on_ranks")
    if mark is None:
        return None
    values = pyfuncitem.funcargs
    arguments = {name: values[name] for name in pyfuncitem._fixtureinfo.argnames}
    layout = {**mark.kwargs, **{name: values[name] for name in ("tp",) if name in arguments}}
    values["run"](pyfuncitem.function, arguments, **layout)
    return True


@pytest.fixture(scope="session")
def pool():
    gpus = torch.cuda.device_count()
    shared = os.environ.get("SHARE_GPU") == "1"
    with Ranks(min(gpus, 8) if gpus and not shared else 4, onrank.setup) as ranks:
        yield ranks


@pytest.fixture
def run(pool):
    """Run a function of a test module on ranks, what the mark `on_ranks` does with a test."""

    def call(function, arguments, *, ranks=None, timeout=120, **layout):
        ranks = ranks or math.prod(layout.get(name, 1) for name in ("tp", "pp", "cp", "ep"))
        if ranks > pool.size:
            pytest.skip(f"needs {ranks} GPUs, found {pool.size}")
        by_name = (function.__module__, function.__name__, arguments)
        skipped = failed = None
        try:
            (skipped, *_) = pool.run(onrank.call, *by_name, ranks=ranks, timeout=timeout, **layout)
        except RankError as error:
            failed = str(error)
        if failed is not None:
            pytest.fail(failed, pytrace=False)
        if skipped is not None:
            pytest.skip(skipped)

    return call
