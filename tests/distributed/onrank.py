# SPDX-License-Identifier: Apache-2.0
"""What a rank does to run a test: it finds it by name, and rewrites its assertions as pytest does.

Without the rewriting an assertion that fails on a rank would not show its values.
"""

import ast
import importlib
import logging
import os
import sys
from importlib.machinery import FileFinder, SourceFileLoader

import pytest
from _pytest.assertion.rewrite import rewrite_asserts

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
