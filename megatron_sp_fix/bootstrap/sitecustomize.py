# SPDX-License-Identifier: Apache-2.0
"""Python runs this as it starts where `run` or `enable` put its folder on the path."""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec, spec_from_file_location


def load(spec: ModuleSpec) -> None:  # noqa: D103
    sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])  # type: ignore[union-attr]


folder = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != folder]
name = "megatron_sp_fix.hook"
package = find_spec("megatron_sp_fix")
if package is None or package.origin is None:
    print(f"megatron-sp-fix: off: {sys.executable} has no megatron_sp_fix", file=sys.stderr)
elif name not in sys.modules and os.environ.get("MEGATRON_SP_FIX") != "0":
    # By its file, since importing the package itself takes longer than a start may.
    file = os.path.join(os.path.dirname(package.origin), "hook.py")
    load(spec_from_file_location(name, file))  # type: ignore[arg-type]
    sys.modules[name].install()
theirs = PathFinder.find_spec("sitecustomize")  # what runs where this folder is not on the path
if theirs:
    load(theirs)
