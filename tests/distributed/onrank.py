# SPDX-License-Identifier: Apache-2.0
"""What a rank does to run a test: it finds it by name, and rewrites its assertions as pytest does.

Without the rewriting an assertion that fails on a rank would not show its values.
"""

import ast
import contextlib
import importlib
import logging
import os
import sys
from importlib.machinery import FileFinder, SourceFileLoader
from unittest import mock

import pytest
import torch
from _pytest.assertion.rewrite import rewrite_asserts

from megatron_sp_fix.demo import ranks

logging.getLogger("megatron").setLevel(logging.ERROR)
HERE = os.path.dirname(os.path.abspath(__file__))


class _Rewriting(SourceFileLoader):
    def source_to_code(self, data, path):
        tree = ast.parse(data, path)
        rewrite_asserts(tree, data, path)
        return compile(tree, path, "exec", dont_inherit=True)

    def path_stats(self, path):
        raise OSError("neither read bytecode, which may not be rewritten, nor write any")


def call(module, name, arguments):
    """Run a test on this rank; return why it was skipped, or None."""
    if module not in sys.modules:
        sys.path_importer_cache[HERE] = FileFinder(HERE, (_Rewriting, [".py"]))
    function = getattr(importlib.import_module(module), name)
    try:
        function(**arguments)
    except pytest.skip.Exception as skipped:
        return str(skipped)
    return None


def setup(rank, size, store, *, tp=1, pp=1, cp=1, ep=1, vpp=None):
    """Be a rank, as :func:`megatron_sp_fix.demo.ranks.setup`, with every other parallelism, too.

    With ``SHARE_GPU=1`` in the environment the ranks share what GPUs there are, at the speed of
    sockets.
    """
    with contextlib.ExitStack() as stack:
        gpus, select = torch.cuda.device_count(), torch.cuda.set_device
        if 0 < gpus < size and os.environ.get("SHARE_GPU") == "1":
            # NCCL wants a GPU for each rank of a host: let each rank call itself a host.
            os.environ["NCCL_HOSTID"] = f"rank {rank}"
            for name, value in {
                "device_count": lambda: size,
                "set_device": lambda _: select(rank % gpus),
            }.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
        ranks.setup(
            rank,
            size,
            store,
            tp=tp,
            pipeline_model_parallel_size=pp,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            virtual_pipeline_model_parallel_size=vpp,
        )
