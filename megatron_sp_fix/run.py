# SPDX-License-Identifier: Apache-2.0
"""Run somebody's script or module with the fix, as a plain ``python`` would run it without."""

import builtins
import os
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from typing import Any, Optional

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
    get_code, names = _module(name) if module else _script(path)
    sys.argv = [names["__file__"] if module else name, *command[1:]]
    startup.install(strict=True)

    def start() -> None:
        # Not by runpy, whose `__main__` is gone while the script's threads still use it, and which
        # has one string for `sys.argv[0]`, as it was given, and for `__file__`, which is absolute.
        main = types.ModuleType("__main__")
        vars(main).update(names, __builtins__=builtins)
        sys.modules["__main__"] = main
        exec(get_code(), vars(main))

    _cut_frames_above({start.__code__, get_code.__code__})
    return start


_Main = tuple[Callable[[], Any], dict[str, Any]]


def _script(path: str) -> _Main:
    if not os.path.isfile(path):
        raise ValueError(f"no script {path}")

    def get_code() -> types.CodeType:
        with open(path, "rb") as stream:
            return compile(stream.read(), path, "exec")

    loader = SourceFileLoader("__main__", path)
    return get_code, {"__file__": path, "__loader__": loader, "__cached__": None}


def _module(name: str) -> _Main:
    try:
        spec = find_spec(name)
        if spec and spec.submodule_search_locations is not None:
            name += ".__main__"
            spec = find_spec(name)
    except ModuleNotFoundError:
        spec = None
    loader: Any = spec and spec.loader
    if spec is None or not hasattr(loader, "get_code"):
        raise ValueError(f"no module named {name!r} that can be run")
    return lambda: loader.get_code(name), {
        "__file__": spec.origin,
        "__loader__": loader,
        "__cached__": spec.cached,
        "__package__": spec.parent,
        "__spec__": spec,
    }


def _cut_frames_above(codes: set[types.CodeType]) -> None:
    """Let the tracebacks of uncaught exceptions begin below the frames of these codes."""
    show = sys.excepthook

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: Optional[types.TracebackType]
    ) -> None:
        node, rest = trace, trace
        while node is not None:
            rest = node.tb_next if node.tb_frame.f_code in codes else rest
            node = node.tb_next
        show(kind, error.with_traceback(rest), rest)  # Python's own reads the exception's

    sys.excepthook = excepthook
