# SPDX-License-Identifier: Apache-2.0
"""The fix in every process: an import hook, and the line in site-packages that installs it.

Where the fix is enabled, every Python process of the environment imports this module as it starts.
So it imports next to nothing until megatron-core is imported. (wrapt has such hooks, too, and its
import alone takes several times what is allowed here.)
"""

from __future__ import annotations

import os
import sys
from _thread import get_ident  # `threading` is not loaded by then, and costs a millisecond

# By this very name, which type checkers take for true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["StartupError", "disable", "enable", "enabled", "install", "installed", "uninstall"]

#: ``0``: off. ``1`` or unset: on where it is enabled. ``strict``: on, and failures raise.
VARIABLE = "MEGATRON_SP_FIX"
ON = ("", "1", "strict")
FILE = "megatron_sp_fix.pth"

# The modules of `sites.SITES`, which a test compares. Said once more, because finders are called
# under Python's global import lock: one that imports by itself can wait for another thread's import
# that waits for that lock.
MODULES = frozenset(
    (
        "megatron.core.models.gpt.gpt_model",
        "megatron.core.models.hybrid.hybrid_model",
        "megatron.core.models.mamba.mamba_model",
        "megatron.core.transformer.multi_token_prediction",
    )
)

_MARK = "# Written by megatron-sp-fix "
# One line, since `site` runs such a file by lines, and silent after the package is uninstalled.
_LINE = (
    r"import sys; exec('try:\n from megatron_sp_fix import startup\nexcept ImportError:\n pass\n"
    r"else:\n startup.install()')"
)
# What a new process is to see: that the line works, and that `site` reads the folder.
_CHECK = """
import os, site, sys
draft, folder = sys.argv[1:]
site.addsitedir(draft)
read = any(os.path.isdir(path) and os.path.samefile(path, folder) for path in sys.path)
sys.exit(not (read and "megatron_sp_fix.startup" in sys.modules))
"""


class StartupError(RuntimeError):
    """The line cannot be put into site-packages or taken out; the message says why."""


class _Finder:
    """Finds modules with call sites by the other finders, and patches them once loaded."""

    def __init__(self) -> None:
        self.strict = False
        self.error: Exception | None = None  # why the fix is off in this process
        self.busy: set[tuple[int, str]] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        key = (get_ident(), name)
        if name not in MODULES or key in self.busy:  # another such finder asks all others, too
            return None
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        self.busy.add(key)
        try:
            spec = next(filter(None, (f.find_spec(name, path, target) for f in others)), None)
        finally:
            self.busy.discard(key)
        if spec and spec.loader and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
        return spec

    def patch(self, module: ModuleType) -> None:
        """Patch a loaded module; a failure leaves all of megatron-core as it was."""
        if self.error is None:
            try:
                mode = os.environ.get(VARIABLE, "")
                if mode not in ON:
                    raise ValueError(f"{VARIABLE}={mode} is none of 0, 1 and strict")
                from .runtime import apply_to

                apply_to(module.__name__)
                return
            except Exception as error:
                self.error = error
                _undo()
                if not self.strict:
                    import logging

                    logging.getLogger(__package__).error(
                        "megatron-sp-fix is off in this process and megatron-core is as it was: %s",
                        error,
                    )
        if self.strict:
            raise self.error  # from every such import: a job must not go on unpatched


class _Loader:
    """Another's loader that tells the finder when it is done."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.finder.patch(module)


def _undo() -> None:
    try:
        from .runtime import restore
    except ImportError:  # uninstalled while this process runs: then nothing is patched
        return
    restore()


def install(*, strict: bool = False) -> None:
    """Apply the fix to megatron-core's modules as each is imported, now or ever.

    Does nothing where the environment says ``MEGATRON_SP_FIX=0``. A failure is logged as one error
    and leaves megatron-core as it was.

    Args:
        strict: raise from those imports instead, as under ``MEGATRON_SP_FIX=strict``.
    """
    mode = os.environ.get(VARIABLE)
    if mode == "0":
        return
    for finder in sys.meta_path:
        if _ours(finder):
            break
    else:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    finder.strict |= strict or mode == "strict"  # type: ignore[attr-defined]
    for name in MODULES & sys.modules.keys():
        module = sys.modules[name]
        if not getattr(getattr(module, "__spec__", None), "_initializing", False):
            finder.patch(module)  # type: ignore[attr-defined]


def installed() -> bool:
    """Whether this process has the import hook."""
    return any(map(_ours, sys.meta_path))


def uninstall() -> None:
    """Take the import hook out of this process; what it patched stays patched."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _ours(finder)]


def _ours(finder: object) -> bool:
    """By name: the package may have been imported anew, with another class."""
    cls = type(finder)
    return (cls.__module__, cls.__qualname__) == (__name__, _Finder.__qualname__)


def enabled() -> str:
    """The file that enables the fix for every process of this environment; empty if none does."""
    import site

    folders = [os.path.dirname(_file()), *site.getsitepackages(), site.getusersitepackages()]
    for folder in folders:
        file = os.path.join(folder, FILE)
        try:
            if _read(file):
                return file
        except StartupError:
            continue
    return ""


def enable() -> str:
    """Make every Python process of this environment start with the import hook.

    Writes one file into site-packages, at once or not at all, after a process was started to see
    that it works.

    Returns:
        str: the file.

    Raises:
        StartupError: the folder cannot be written, is not read by processes that start, or has a
            file of that name already that is another's or another version's. Nothing is left.
    """
    import subprocess
    import tempfile

    file, text = _file(), _text()
    folder = os.path.dirname(file)
    if _read(file) not in ("", text):
        raise StartupError(
            f"{file} was written by another version: run `megatron-sp-fix disable`, then enable"
        )
    try:
        with tempfile.TemporaryDirectory(prefix=".megatron_sp_fix", dir=folder) as draft:
            with open(os.path.join(draft, FILE), "w", encoding="utf-8") as stream:
                stream.write(text)
            unwanted = (VARIABLE, "PYTHONPATH")  # which another process may not have
            environment = {k: v for k, v in os.environ.items() if k not in unwanted}
            command = [sys.executable, "-c", _CHECK, draft, folder]
            if subprocess.run(command, env=environment, check=False).returncode:
                raise StartupError(
                    f"{sys.executable} does not read {folder} as it starts, or does not find "
                    "megatron_sp_fix by then: install the package into the environment itself, "
                    "with its site-packages on"
                )
            os.replace(os.path.join(draft, FILE), file)
    except OSError as error:
        raise StartupError(
            f"{error}: enabling starts {sys.executable} and writes into {folder}; do it as its "
            "owner, or in an environment of yours"
        ) from error
    return file


def disable() -> str:
    """Take back what :func:`enable` wrote, of whichever version.

    Returns:
        str: the file that is gone; empty if there was none.

    Raises:
        StartupError: the file is another's, or cannot be removed; or one outside this environment
            enables it, too.
    """
    file = _file()
    found = _read(file)
    try:
        if found:
            os.unlink(file)
    except OSError as error:
        raise StartupError(f"{error}: disable it as the owner of that folder") from error
    other = enabled()
    if other:
        raise StartupError(f"{other} enables it, too, or still: disable it in that environment")
    return file if found else ""


def _file() -> str:
    import sysconfig

    return os.path.join(sysconfig.get_path("purelib"), FILE)


def _text() -> str:
    from . import __version__

    return f"{_MARK}{__version__}; `megatron-sp-fix disable` removes it.\n{_LINE}\n"


def _read(file: str) -> str:
    """What is in the file; empty if there is none."""
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{file} cannot be read: {error}") from error
    if not text.startswith(_MARK):
        raise StartupError(f"{file} was not written by megatron-sp-fix, and is left as it is")
    return text
