# SPDX-License-Identifier: Apache-2.0
"""Tests that run on ranks: on the same processes, as long as the layout stays the same."""

import math

import onrank
import pytest
import torch

from megatron_sp_fix.demo.ranks import RankError, Ranks

#: How megatron-core calls the sizes of a layout; that of tensor parallelism has its short name.
SIZES = {
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
}


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "on_ranks(tp=1, pp=1, cp=1, ep=1, vpp=None, ranks=None, timeout=120): run the test on "
        "every rank; `tp` is that of the test's argument, if it has one; arguments are pickled",
    )


def _layout(item):
    """Return the keywords of the mark, and `tp` if the test has such a parameter; or None."""
    mark = item.get_closest_marker("on_ranks")
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return mark and {**mark.kwargs, **{name: params[name] for name in ("tp",) if name in params}}


def pytest_collection_modifyitems(items):
    for item in items:
        if _layout(item) is not None and "run" not in item.fixturenames:
            item.fixturenames.append("run")
    # By layout, so that each is set up once.
    items.sort(key=lambda item: repr(_layout(item)))


def pytest_pyfunc_call(pyfuncitem):
    layout, values = _layout(pyfuncitem), pyfuncitem.funcargs
    if layout is None:
        return None
    arguments = {name: values[name] for name in pyfuncitem._fixtureinfo.argnames}
    values["run"](pyfuncitem.function, arguments, **layout)
    return True


@pytest.fixture(scope="session")
def _ranks():
    """Return the ranks of a layout; those of the layout before end."""
    current = {}

    def ranks(size, layout):
        key = repr((size, layout))
        if key not in current:
            end()
            current[key] = Ranks(size, **{SIZES.get(name, name): layout[name] for name in layout})
        return current[key]

    def end():
        for each in current.values():
            each.__exit__()
        current.clear()

    yield ranks
    end()


@pytest.fixture
def run(_ranks):
    """Run a function of a test module on ranks, what the mark `on_ranks` does with a test."""

    def call(function, arguments, *, ranks=None, timeout=120, **layout):
        size = ranks or math.prod(layout.get(name, 1) for name in ("tp", "pp", "cp", "ep"))
        gpus = torch.cuda.device_count()
        if 0 < gpus < size:
            pytest.skip(f"needs {size} GPUs, found {gpus}")
        by_name = (function.__module__, function.__name__, arguments)
        skipped = failed = None
        try:
            skipped, *_ = _ranks(size, layout).run(onrank.call, *by_name, timeout=timeout)
        except RankError as error:
            failed = str(error)
        if failed is not None:
            pytest.fail(failed, pytrace=False)
        if skipped is not None:
            pytest.skip(skipped)

    return call
