# SPDX-License-Identifier: Apache-2.0
"""Run somebody's script or module with the fix, as a plain ``python`` would run it without."""

import builtins
import os
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from typing import Any, Optional, cast

from . import startup

__all__ = ["UsageError", "prepare"]


class UsageError(ValueError):
    """What was asked for on the command line cannot be done."""


def prepare(command: Sequence[str]) -> Callable[[], None]:
    """Make this process one that is about to run a script or a module as ``__main__``.

    The fix will be applied as megatron-core is imported; if it cannot be, that import raises.

    Args:
        command: as after ``python``: a script, or ``-m`` and a module's name; then its arguments.

    Returns:
        Callable: runs it.

    Raises:
        UsageError: there is no such script or module.
    """
    module = list(command[:1]) == ["-m"]
    if len(command) < 1 + module or (not module and command[0].startswith("-")):
        raise UsageError("run: name a script, or a module after -m")
    # What plain Python has by the time when it looks for a module, whose packages it imports then.
    name, *arguments = command[module:]
    sys.argv = ["-m" if module else name, *arguments]
    path = os.path.join(os.getcwd(), name)  # as Python, which does not normalize it
    # What it puts in front; nothing under `-I`, `-P` or PYTHONSAFEPATH.
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.realpath(path))
    startup.install(strict=True)
    if not startup.installed():
        print(f"megatron-sp-fix: off, by {startup.VARIABLE}=0", file=sys.stderr)
    get_code, names = _module(name) if module else _script(path)
    if module:
        sys.argv[0] = names["__file__"]

    def start() -> None:
        # Not by runpy, whose `__main__` is gone while the script's threads still use it, and which
        # has one string for `sys.argv[0]`, as it was given, and for `__file__`, which is absolute.
        main = types.ModuleType("__main__")
        vars(main).update(names, __annotations__={}, __builtins__=builtins)
        sys.modules["__main__"] = main
        exec(get_code(), vars(main))

    _cut_frames_above({start.__code__, get_code.__code__})
    return start


def _script(path: str) -> tuple[types.FunctionType, dict[str, Any]]:
    if not os.path.isfile(path):
        raise UsageError(f"run: no script {path}")

    def get_code() -> types.CodeType:
        with open(path, "rb") as stream:
            return compile(stream.read(), path, "exec")

    loader = SourceFileLoader("__main__", path)
    names = {"__file__": path, "__loader__": loader, "__cached__": None}
    return cast(types.FunctionType, get_code), names


def _module(name: str) -> tuple[types.FunctionType, dict[str, Any]]:
    try:
        spec = find_spec(name)
        if spec and spec.submodule_search_locations is not None:
            name += ".__main__"
            spec = find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # its package's own failure
        spec = None
    loader: Any = spec and spec.loader
    code = loader.get_code(name) if hasattr(loader, "get_code") else None
    if spec is None or code is None:
        raise UsageError(f"run: no module named {name!r} that can be run")
    return cast(types.FunctionType, lambda: code), {
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
