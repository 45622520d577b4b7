# SPDX-License-Identifier: Apache-2.0
"""Python runs this as it starts where `run` or `enable` put its folder on the path."""

import os
import sys
from importlib import import_module, util
from importlib.machinery import PathFinder

folder = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != folder]
package = util.find_spec("megatron_sp_fix")
# Found without the package, since importing that takes longer than a start may.
spec = package and PathFinder.find_spec("megatron_sp_fix.hook", package.submodule_search_locations)
if not spec or not spec.loader:
    print(f"megatron-sp-fix: off: {sys.executable} has no megatron_sp_fix", file=sys.stderr)
elif spec.name not in sys.modules and os.environ.get("MEGATRON_SP_FIX") != "0":
    hook = sys.modules[spec.name] = util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    hook.install()
# Then the environment's own. If there is none, `site`, which imports this one, expects the error.
del sys.modules["sitecustomize"]
import_module("sitecustomize")
