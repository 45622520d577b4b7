# SPDX-License-Identifier: Apache-2.0
"""The fix in every process: an import hook, and the line in site-packages that installs it.

Where the fix is enabled, every Python process of the environment imports this module as it starts.
So it imports next to nothing until megatron-core is imported. (wrapt has such hooks, too, and its
import alone takes several times what is allowed here.)
"""

from __future__ import annotations

import os
import sys

# By this very name, which type checkers take for true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["StartupError", "disable", "enable", "enabled", "install", "installed", "uninstall"]

#: ``0``: off. ``1`` or unset: on where it is enabled. ``strict``: on, and failures raise.
VARIABLE = "MEGATRON_SP_FIX"
FILE = "megatron_sp_fix.pth"

_MARK = "# Written by megatron-sp-fix "
# One line, since `site` runs such a file by lines, and silent after the package is uninstalled.
_LINE = (
    r"import sys; exec('try:\n from megatron_sp_fix import startup\nexcept ImportError:\n pass\n"
    r"else:\n startup.install()')"
)


class StartupError(RuntimeError):
    """The line cannot be put into site-packages or taken out; the message says why."""


class _Finder:
    """Finds nothing by itself: patches a module with call sites once another finder's loaded it."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.failed = False  # it has said so; modules that were being loaded are still to come

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("megatron.core."):
            return None
        from .sites import SITES

        if not any(site.module == name for site in SITES):
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                self._act_after(spec.loader)
                return spec
        return None

    def _act_after(self, loader: Any) -> None:
        """Patch a module as soon as this loader has executed it."""

        def exec_module(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)
            execute(module)
            self._patch(module.__name__)

        try:
            execute = loader.exec_module
            # On the instance, which is this module's alone: its type stays what others look for.
            vars(loader)["exec_module"] = exec_module
        except (AttributeError, TypeError) as error:
            self._give_up(error)

    def _patch(self, name: str) -> None:
        """Patch a loaded module; a failure leaves all of megatron-core as it was."""
        if self.failed:
            return
        try:
            mode = os.environ.get(VARIABLE, "")
            if mode not in ("", "1", "strict"):
                raise ValueError(f"{VARIABLE}={mode} is none of 0, 1 and strict")
            from .runtime import apply_to

            apply_to(name)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        from .runtime import remove

        self.failed = True
        remove()  # and takes this finder out
        if self.strict:
            raise error
        import logging

        logging.getLogger(__package__).error(
            "megatron-sp-fix is off in this process and megatron-core is as it was: %s", error
        )


def install(*, strict: bool = False) -> None:
    """Apply the fix to megatron-core's modules as each is imported, now or ever.

    Does nothing where the environment says ``MEGATRON_SP_FIX=0``. A failure is logged as one error
    and leaves megatron-core as it was.

    Args:
        strict: raise from that import instead, as under ``MEGATRON_SP_FIX=strict``.
    """
    mode = os.environ.get(VARIABLE)
    if mode == "0":
        return
    finder = next((f for f in sys.meta_path if isinstance(f, _Finder)), None)
    if finder is None:
        finder = _Finder(strict)
        sys.meta_path.insert(0, finder)
    finder.strict |= strict or mode == "strict"


def installed() -> bool:
    """Whether this process has the import hook."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def uninstall() -> None:
    """Take the import hook out of this process; what it patched stays patched."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]


def enabled() -> str:
    """The file that enables the fix for every process of this environment; empty if none does."""
    files = (os.path.join(folder, FILE) for folder in sys.path)
    return next((file for file in files if os.path.isfile(file)), "")


def enable() -> str:
    """Make every Python process of this environment start with the import hook.

    Writes one file into site-packages, at once or not at all, and starts a process to see that it
    works.

    Returns:
        str: the file.

    Raises:
        StartupError: the folder cannot be written, is not read by processes that start, or has a
            file of that name already that is another's or another version's. Nothing is left.
    """
    import subprocess
    import tempfile

    file, text = _file(), _text()
    if _read(file) == text:
        return file
    if _read(file):
        raise StartupError(
            f"{file} was written by another version: run `megatron-sp-fix disable`, then enable"
        )
    try:
        handle, draft = tempfile.mkstemp(prefix=".megatron_sp_fix", dir=os.path.dirname(file))
        with open(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(draft, 0o644)
        os.replace(draft, file)
    except OSError as error:
        raise StartupError(
            f"{error}: enabling needs to write there; as its owner, or in an environment of yours"
        ) from error
    code = f"import sys; sys.exit('{__name__}' not in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode:
        os.unlink(file)
        raise StartupError(
            f"{sys.executable} does not run {file} as it starts, or does not find megatron_sp_fix "
            "by then: install the package into the environment itself, with its site-packages on"
        )
    return file


def disable() -> str:
    """Take back what :func:`enable` wrote, of whichever version.

    Returns:
        str: the file that is gone; empty if there was none.

    Raises:
        StartupError: the file is another's, or cannot be removed.
    """
    file = _file()
    if not _read(file):
        return ""
    try:
        os.unlink(file)
    except OSError as error:
        raise StartupError(f"{error}: disable it as the owner of that folder") from error
    return file


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
