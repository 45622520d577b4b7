# SPDX-License-Identifier: Apache-2.0
"""Apply the table of call sites to the megatron-core of this process, and take it back."""

import functools
import importlib
import inspect
import logging
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from . import startup
from .sites import (
    NEWEST,
    OLDEST,
    Found,
    Site,
    UnsupportedMegatronError,
    find,
    find_in,
    installed_root,
    version,
)

__all__ = ["SiteStatus", "Status", "applied", "apply", "remove", "status"]

_log = logging.getLogger("megatron_sp_fix")
_lock = threading.RLock()


@dataclass(eq=False)
class _Patch:
    """One replaced method.

    Attributes:
        owner: the class whose ``__dict__`` holds the method.
        original: the very object that stood there.
        replacement: the object put in its place.
        active: False once removed: a later patch on top may still call the replacement, which then
            only passes the call on.
        covered_by: what stood in the replacement's place when it was removed, if not itself.
    """

    owner: type
    method: str
    original: Any
    replacement: Any = None
    active: bool = True
    covered_by: Any = None


_patches: dict[str, _Patch] = {}
_blocks = 0  # how many `applied` blocks are open, in any thread
_undo: tuple[str, ...] = ()  # what the first of them replaced


@dataclass(frozen=True)
class SiteStatus:
    """What one call site does.

    Attributes:
        name: ``Class.method``.
        native: what the installed code does by itself: ``"none"`` (no shard: the bug), ``"native"``
            (megatron-core's own scatter) or ``"source"`` (this fix, patched into the source).
        patched: whether this process runs the fix at this site, by either form.
        by: who replaced the method in this process: modules, outermost first; empty if nobody.
    """

    name: str
    native: str
    patched: bool
    by: tuple[str, ...]


@dataclass(frozen=True)
class Status:
    """The installed megatron-core and its call sites.

    Attributes:
        version: for example ``"0.18.2"``.
        path: the folder that holds ``megatron/core``.
        sites: one entry a call site.
        enabled: the file by which every process of this environment gets the fix; empty if none.
    """

    version: str
    path: str
    sites: tuple[SiteStatus, ...]
    enabled: str


def apply(*, also: Iterable[type] = ()) -> tuple[str, ...]:
    """Make every standalone forward of a language tower run on shards under sequence parallelism.

    Replaces the methods that embed tokens for a decoder: ``GPTModel._preprocess`` and its siblings
    in ``MambaModel``, ``HybridModel`` and MTP. Works before or after models are built; models and
    their embeddings are not touched. Where megatron-core was patched from source already, nothing
    is replaced. Every rank must call it.

    Args:
        also: classes that embed by a ``_preprocess`` or ``forward`` of their own, without calling
            the original: see :func:`audit`.

    Returns:
        tuple[str, ...]: the methods replaced by this call, as ``module.Class.method``; empty when
        all were replaced before.

    Raises:
        UnsupportedMegatronError: megatron-core is missing, older than 0.12, or has call sites that
            are not recognized; or a class of `also` embeds in a way that passing a shard in would
            skip. Nothing has been replaced then.
    """
    global _undo
    root = installed_root()
    targets = _table(root) + [(_own_site(cls), cls) for cls in also]
    with _lock:
        _undo = ()  # it stays, whatever `applied` blocks are open
        return _replace(root, targets)


def apply_to(module: str) -> None:
    """Patch the call sites of one module that has just been loaded, importing nothing.

    For the import hook, which runs while other modules of megatron-core are half loaded.

    Raises:
        UnsupportedMegatronError: as :func:`apply`, for any of the modules.
    """
    root = installed_root()
    # Not `warnings`: under `-W error` that would be a failure.
    found = _supported(root, tell=_log.warning)
    _replace(root, [(m, _owner(m)) for m in found if m.site.module == module])


def remove() -> tuple[str, ...]:
    """Put back the very methods that :func:`apply` replaced.

    A method that somebody else has patched since stays as they left it, with this fix switched off
    underneath, and a warning names it.

    Returns:
        tuple[str, ...]: the methods restored, as ``module.Class.method``.
    """
    startup.uninstall()  # or it would patch what is imported from now on
    return restore()


def restore(names: Optional[Sequence[str]] = None) -> tuple[str, ...]:
    """Do what :func:`remove` does to these methods, or to all; the import hook stays."""
    with _lock:
        restored = []
        for name, patch in list(_patches.items()):
            if not patch.active or not (names is None or name in names):
                continue
            patch.active = False
            current = patch.owner.__dict__.get(patch.method)
            if current is patch.replacement:
                setattr(patch.owner, patch.method, patch.original)
                restored.append(name)
                del _patches[name]
            else:
                patch.covered_by = current
                _log.warning(
                    "%s carries a later patch by %s, which stays; the fix below it is off",
                    name,
                    _author(current),
                )
        return tuple(restored)


@contextmanager
def applied() -> Iterator[None]:
    """Apply for the length of a ``with`` block; if it was applied before, it stays so after.

    Raises:
        UnsupportedMegatronError: as :func:`apply`.
    """
    global _blocks, _undo
    root = installed_root()
    targets = _table(root)
    with _lock:
        changed = _replace(root, targets)
        if _blocks == 0:
            _undo = changed
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                restore(_undo)


def status() -> Status:
    """Describe the installed megatron-core: its version, its place and each of its call sites.

    Reads source files and this process's modules; imports neither torch nor megatron-core's models.

    Raises:
        UnsupportedMegatronError: megatron-core is missing or not recognized.
    """
    root = installed_root()
    sites = []
    for match in find(root):
        site = match.site
        patch = _patches.get(f"{site.module}.{site.name}")
        owner = getattr(sys.modules.get(site.module), site.cls, None)
        current = owner.__dict__.get(site.method) if owner else None
        ours = bool(patch and patch.active)
        author = _author(current) if current is not None else site.module
        by = [] if author in (site.module, __name__) else [author]
        if ours:
            by.append("megatron_sp_fix")
        sites.append(SiteStatus(site.name, match.form, ours or match.form == "source", tuple(by)))
    release = ".".join(map(str, version(root)))
    return Status(release, str(root), tuple(sites), startup.enabled())


def covers(cls: type, method: str) -> bool:
    """Whether this process has patched a class's own method by ``apply(also=...)``."""
    patch = _patches.get(f"{cls.__module__}.{cls.__qualname__}.{method}")
    return bool(patch and patch.active and patch.owner is cls)


def _table(root: Path) -> list[tuple[Found, Union[type, ImportError]]]:
    """The call sites of the table with their classes.

    Not to be called under the lock: a thread that imports one of them may wait for it in its hook.
    """
    return [(match, _owner(match)) for match in _supported(root)]


def _owner(match: Found) -> Union[type, ImportError]:
    """Import the class of a call site that is to be patched, or tell why it cannot be."""
    try:
        owner: type = getattr(importlib.import_module(match.site.module), match.site.cls)
    except ImportError as error:
        # As 0.12 without Transformer Engine: nobody can use that model here.
        return error
    except AttributeError as error:
        raise UnsupportedMegatronError(
            f"{match.site.module} is still being imported: call apply() before or after that"
        ) from error
    return owner


def _replace(
    root: Path, targets: Sequence[tuple[Found, Union[type, ImportError]]]
) -> tuple[str, ...]:
    """Replace the methods of call sites in their classes, all or none."""
    with _lock:
        pending: list[tuple[str, _Patch]] = []
        notes: list[str] = []
        for match, owner in targets:
            site = match.site
            if match.form == "source":
                notes.append(f"{site.name} is patched in its source")
                continue
            if isinstance(owner, ImportError):
                notes.append(f"{site.name} cannot be imported ({owner})")
                continue
            key = f"{site.module}.{site.name}"
            current = owner.__dict__[site.method]
            known = _patches.get(key)
            if known and known.owner is owner:
                if known.active:
                    if current is not known.replacement:
                        notes.append(f"{site.name} carries a later patch by {_author(current)}")
                    continue
                if current in (known.replacement, known.covered_by):
                    pending.append((key, known))
                    continue
            patch = _Patch(owner, site.method, current)
            patch.replacement = _replacement(patch, match)
            pending.append((key, patch))

        for name, patch in pending:
            _patches[name] = patch
            patch.active = True
            if patch.owner.__dict__[patch.method] is patch.original:
                setattr(patch.owner, patch.method, patch.replacement)
        if pending or notes:
            short = [f"{patch.owner.__name__}.{patch.method}" for _, patch in pending]
            _log.info(
                "megatron-core %s at %s: %s",
                ".".join(map(str, version(root))),
                root,
                "; ".join(([f"patched {', '.join(short)}"] if short else []) + notes),
            )
        return tuple(name for name, _ in pending)


def _own_site(cls: type) -> Found:
    """Find the call site in a class's own method, or say why it cannot be patched."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError) as error:
        raise UnsupportedMegatronError(
            f"apply(also=...): the source of {cls.__qualname__}, which tells whether it can be "
            f"patched, cannot be read: {error}"
        ) from error
    for method in ("_preprocess", "forward"):
        if method in cls.__dict__:
            site = Site("also", cls.__module__, cls.__qualname__, method)
            return find_in(source, site)
    raise UnsupportedMegatronError(
        f"apply(also=...): {cls.__qualname__} has no _preprocess or forward of its own; "
        "the class that it inherits them from is the one to name"
    )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)  # the caller of `apply`


def _supported(root: Path, tell: Callable[[str], None] = _warn) -> list[Found]:
    """Find the call sites of a supported release; tell of a newer one that is recognized."""
    release = version(root)
    if release[:2] < OLDEST:
        raise UnsupportedMegatronError(
            f"megatron-core {'.'.join(map(str, release))} at {root} is older than "
            f"{'.'.join(map(str, OLDEST))}, the oldest release that megatron-sp-fix supports"
        )
    found = find(root)
    if release[:2] > NEWEST:
        tell(
            f"megatron-core {'.'.join(map(str, release))} is newer than "
            f"{'.'.join(map(str, NEWEST))}, the newest release that megatron-sp-fix is tested "
            "with; its call sites are recognized and are patched"
        )
    return found


def _replacement(patch: _Patch, match: Found) -> Callable[..., Any]:
    """Make the method that stands in: it shards, then runs the original with the shard."""
    original, names = patch.original, match.parameters

    @functools.cache
    def fix() -> Any:
        # On the first call: it imports parts of megatron-core that may not be loaded yet.
        from . import embedding

        return embedding

    def argument(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> Any:
        return args[position] if len(args) > position else kwargs.get(name)

    if match.site.embeds == "embedding":
        at = names.index("embedding")

        @functools.wraps(original)
        def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
            embedding = argument("embedding", args, kwargs, at)
            if not patch.active or embedding is None:
                return original(self, *args, **kwargs)
            sharding = fix().sharding_embedding(self, embedding)
            if len(args) > at:
                args = (*args[:at], sharding, *args[at + 1 :])
            else:
                kwargs["embedding"] = sharding
            return original(self, *args, **kwargs)

    else:
        at = names.index("decoder_input")

        @functools.wraps(original)
        def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
            if (
                not patch.active
                or argument("decoder_input", args, kwargs, at) is not None
                or not self.pre_process
                or not fix().needs_shard(self, self.embedding)
            ):
                return original(self, *args, **kwargs)
            call = dict(zip(names, args))
            if (
                len(args) > len(names)
                or call.keys() & kwargs.keys()
                or "input_ids" not in call | kwargs
            ):
                return original(self, *args, **kwargs)  # to raise its own TypeError
            call |= kwargs
            if call.get("padding_mask") is not None:
                call["padding_mask"] = fix().shard_padding_mask(
                    self, call["padding_mask"], call["input_ids"]
                )
            call["decoder_input"] = fix().embed_for_decoder(
                self, call["input_ids"], call.get("position_ids"), call.get("inference_context")
            )
            return original(self, **call)

    return replacement


def _author(function: Any) -> str:
    """Name the code that a function comes from, even where `functools.wraps` renamed it."""
    names = getattr(function, "__globals__", None) or {}
    return str(names.get("__name__") or getattr(function, "__module__", None) or repr(function))
