# SPDX-License-Identifier: Apache-2.0
"""Run somebody's script or module with the fix, as a plain ``python`` would run it without."""

import builtins
import os
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from typing import Optional

from . import startup

__all__ = ["prepare"]


def prepare(command: Sequence[str], *, module: bool = False) -> Callable[[], None]:
    """Make this process one that is about to run a script or a module as ``__main__``.

    The fix will be applied as megatron-core is imported; if it cannot be, that import raises.

    Args:
        command: the script or the module's name, and its arguments.
        module: whether it is a module's name, as after ``python -m``.

    Returns:
        Callable: runs it.

    Raises:
        ValueError: there is no such script or module.
    """
    name, path = command[0], os.path.abspath(command[0])
    # What plain Python puts in front; nothing under `-P` or PYTHONSAFEPATH.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.realpath(path))
    if module and not _exists(name):
        raise ValueError(f"no module named {name!r}")
    if not module and not os.path.isfile(path):
        raise ValueError(f"no script {path}")
    sys.argv = list(command)
    startup.install(strict=True)

    def start() -> None:
        if module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            _run_script(path)

    _cut_frames_above({start.__code__, _run_script.__code__})
    return start


def _run_script(path: str) -> None:
    # Not `runpy.run_path`: it has one string for `sys.argv[0]`, which stays as it was given, and
    # for `__file__`, which is absolute; and its `__main__` is gone while threads still use it.
    main = types.ModuleType("__main__")
    vars(main).update(
        __file__=path,
        __builtins__=builtins,
        __loader__=SourceFileLoader("__main__", path),
        __cached__=None,
    )
    sys.modules["__main__"] = main
    with open(path, "rb") as stream:
        code = compile(stream.read(), path, "exec")
    exec(code, vars(main))


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _cut_frames_above(codes: set[types.CodeType]) -> None:
    """Let the tracebacks of uncaught exceptions begin where those of a plain run begin."""
    show = sys.excepthook

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: Optional[types.TracebackType]
    ) -> None:
        node, rest = trace, trace
        while node is not None:
            rest = node.tb_next if node.tb_frame.f_code in codes else rest
            node = node.tb_next
        show(kind, error, rest)

    sys.excepthook = excepthook
