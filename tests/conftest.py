# SPDX-License-Identifier: Apache-2.0
"""Options of the whole suite."""

import dataclasses
import os
import sys
import venv
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--unpatched",
        action="store_true",
        help="leave the fix off: every distributed test must fail on a release with the bug",
    )
    parser.addoption("--bf16", action="store_true", help="build models in bfloat16")


def pytest_configure(config):
    # The ranks are processes of their own and inherit it.
    os.environ["UNPATCHED"] = "1" if config.getoption("--unpatched") else ""
    os.environ["BF16"] = "1" if config.getoption("--bf16") else ""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    import logging

    logging.getLogger("megatron").setLevel(logging.ERROR)


@pytest.fixture
def torchrun():
    """Python's arguments to start two ranks, over loopback, on a port that is free."""
    ranks = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d")
    return (*ranks, "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1")


@dataclasses.dataclass
class Environment:
    """A virtual environment of its own, in which what this one has can be imported."""

    folder: Path
    python: str
    variables: dict[str, str]


@pytest.fixture
def environment(tmp_path):
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True, with_pip=False)
    python = str(folder / "bin/python")
    (packages,) = folder.glob("lib/python*/site-packages")
    here = [path for path in sys.path if os.path.isdir(path)]
    # By a name that `site` reads before that of the file which `enable` writes.
    (packages / "_paths.pth").write_text("\n".join([*here, str(Path(__file__).parents[1])]))
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "UNPATCHED")}
    return Environment(tmp_path, python, variables)
