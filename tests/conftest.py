# SPDX-License-Identifier: Apache-2.0
"""Options of the whole suite."""

import os

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--unpatched",
        action="store_true",
        help="leave the fix off: every distributed test must fail on a release with the bug",
    )


def pytest_configure(config):
    # The ranks are processes of their own and inherit it.
    os.environ["UNPATCHED"] = "1" if config.getoption("--unpatched") else ""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    import logging

    logging.getLogger("megatron").setLevel(logging.ERROR)
