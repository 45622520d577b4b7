# SPDX-License-Identifier: Apache-2.0
"""Replace the methods that embed tokens in the megatron-core of this process, and put them back."""

import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, Optional, Union

from .sites import Found, Site, UnsupportedMegatronError, installed_root, supported, version

__all__ = ["SiteStatus", "Status", "applied", "apply", "remove", "status"]

_lock = threading.RLock()
_patches: dict[tuple[type, str], "_Patch"] = {}
_undo: list[tuple[type, str]] = []  # what `applied` blocks, open in any thread, replaced
_blocks = 0
_removed = False  # nothing that is imported from now on is to be patched


class _Patch:
    """A replaced method: the very object that stood in the class, and what stands there now.

    Once removed it is not active: a later patch by somebody else may still call the replacement,
    which then only passes the call on.
    """

    def __init__(self, original: Any, found: Found) -> None:
        self.original, self.found, self.active = original, found, True
        make = self._embeds if found.site.embeds == "self" else self._is_given
        self.replacement = update_wrapper(make(), original)

    def _call(self, owner: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the original as Python would if it still stood in the class."""
        if type(self.original) is FunctionType:
            return self.original(owner, *args, **kwargs)
        bind = getattr(type(self.original), "__get__", None)
        method = bind(self.original, owner, type(owner)) if bind else self.original
        return method(*args, **kwargs)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = self.found.parameters
        at = names.index(name) if name in names else len(args)
        return args[at] if at < len(args) else kwargs.get(name)

    def _embeds(self) -> Callable[..., Any]:
        """The replacement of a method that calls ``self.embedding``."""

        def replacement(owner: Any, *args: Any, **kwargs: Any) -> Any:
            if (
                not self.active
                or self._argument("decoder_input", args, kwargs) is not None
                or not _fix().needs_shard(owner, getattr(owner, "embedding", None))
            ):
                return self._call(owner, *args, **kwargs)
            context = self._argument("inference_context", args, kwargs)
            if context is None:
                context = kwargs.get("inference_params")  # its old name, by keyword alone
            call = partial(self._call, owner, *args, **kwargs)
            return _fix().sharding(owner, call, context, self.found.native != "own scatter")

        return replacement

    def _is_given(self) -> Callable[..., Any]:
        """The replacement of a method that calls or passes on its argument ``embedding``."""

        def replacement(owner: Any, *args: Any, **kwargs: Any) -> Any:
            embedding = self._argument("embedding", args, kwargs)
            hidden_states = self._argument("hidden_states", args, kwargs)
            if self.active and embedding is not None and hidden_states is not None:
                embedding = _fix().sharding_rows(owner, embedding, hidden_states)
                at = self.found.parameters.index("embedding")
                if at < len(args):
                    args = (*args[:at], embedding, *args[at + 1 :])
                else:
                    kwargs["embedding"] = embedding
            return self._call(owner, *args, **kwargs)

        return replacement


def _fix() -> Any:
    """The fix itself, imported at the first call: megatron-core may be half loaded before that."""
    name = f"{__package__}.embedding"
    return sys.modules.get(name) or importlib.import_module(name)


class SiteStatus(NamedTuple):
    """What one call site does in this process.

    Attributes:
        name: ``Class.method``.
        native: what the installed code does by itself: ``"no shard"`` (the bug), ``"own scatter"``
            (megatron-core's) or ``"this fix"`` (patched by ``diff``).
        state: ``"patched"`` if the class's method is this package's or reaches it, ``"this fix"``
            if the source is patched, ``"not imported"``, ``"not patched"``, or ``"cannot tell"`` if
            somebody replaced the method by something that hides what it calls.
        by: the module of whoever replaced the method; empty if nobody did.
    """

    name: str
    native: str
    state: str
    by: str


class Status(NamedTuple):
    """The installed megatron-core: its version, the folder that holds it and its call sites."""

    version: str
    root: str
    sites: tuple[SiteStatus, ...]


def apply(*, also: Iterable[Union[type, str]] = ()) -> tuple[str, ...]:
    """Make every standalone forward of a language tower run on shards under sequence parallelism.

    Replaces ``GPTModel._preprocess`` and its siblings in ``MambaModel``, ``HybridModel``, MTP and,
    where it is loaded, ModelOpt's EAGLE-3. Works before or after models are built, and touches
    none. Where megatron-core was patched in its source, nothing is replaced. Every rank must call
    it.

    Args:
        also: classes with a ``_preprocess`` or ``forward`` of their own that embeds, or strings
            ``"module:Class"`` and ``"module:Class.method"``. A method with a parameter
            ``decoder_input`` is acted on when that is None, one without it always.

    Returns:
        tuple[str, ...]: the methods replaced by this call, as ``module.Class.method``.

    Raises:
        UnsupportedMegatronError: megatron-core is missing, too old or not recognized, or a class
            or method of `also` is not there. Nothing has been replaced then.
    """
    keys = _apply(also)
    _undo.clear()  # it stays, whatever `applied` blocks are open
    return tuple(map(_name, keys))


def _apply(also: Iterable[Union[type, str]]) -> list[tuple[type, str]]:
    global _removed
    found, remark = supported(installed_root())
    if remark:
        warnings.warn(remark, stacklevel=3)
    targets = []
    for row in found:
        try:
            module = importlib.import_module(row.site.module)
        except ImportError:  # as 0.12's MambaModel without Transformer Engine: nobody can use it
            continue
        targets.append((_class(module, row.site.cls), row))
    targets += [_named(name) for name in (*also, *_eagle())]
    _removed = False
    return _replace(targets)


def apply_to(module: str, also: Iterable[str] = ()) -> tuple[str, ...]:
    """Patch the call sites of a module that has just been loaded, importing no other.

    Raises:
        UnsupportedMegatronError: as :func:`apply`.
    """
    if _removed:
        return ()
    found = supported(installed_root())[0]
    targets = [
        (_class(sys.modules[module], row.site.cls), row)
        for row in found
        if row.site.module == module
    ]
    targets += [_named(n) for n in (*also, *_eagle()) if n.split(":")[0] == module]
    return tuple(map(_name, _replace(targets)))


def remove() -> tuple[str, ...]:
    """Put back the very methods that were replaced, and return their names.

    A method that somebody else has patched since stays as they left it, with this fix switched off
    underneath; a warning names it.
    """
    global _removed
    _removed = True
    return _restore(list(_patches))


@contextmanager
def applied(*, also: Iterable[Union[type, str]] = ()) -> Iterator[None]:
    """Apply for the length of a ``with`` block; what was patched before stays patched after."""
    global _blocks
    keys = _apply(also)
    with _lock:
        _undo.extend(keys)
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                _restore(_undo)
                _undo.clear()


def status() -> Status:
    """Describe the installed megatron-core and its call sites, without importing any of it.

    Raises:
        UnsupportedMegatronError: megatron-core is missing, too old or not recognized.
    """
    root = installed_root()
    rows = []
    for site, native, _ in supported(root)[0]:
        owner = getattr(sys.modules.get(site.module), site.cls, None)
        current = owner.__dict__.get(site.method) if owner else None
        state, by = "not imported", ""
        if native == "this fix":
            state = native
        elif owner and current is not None:
            patch = _patches.get((owner, site.method))
            state, by = _state(current, patch), _author(current, site.module)
        rows.append(SiteStatus(site.name, native, state, by))
    return Status(".".join(map(str, version(root))), str(root), tuple(rows))


def _state(current: Any, patch: Optional[_Patch]) -> str:
    """Whether calling what stands in a class reaches the replacement, as far as can be seen."""
    if patch is None or current is patch.original:
        return "not patched"
    seen: list[Any] = []
    left = [current]
    while left:
        one = left.pop()
        if one is patch.replacement:
            return "patched"
        if not any(one is other for other in seen):
            seen.append(one)
            cells = getattr(one, "__closure__", None) or ()
            left += [getattr(cell, "cell_contents", None) for cell in cells]
            left += [getattr(one, name, None) for name in ("__wrapped__", "__func__", "func")]
    return "cannot tell"


def _author(current: Any, home: str) -> str:
    names = getattr(current, "__globals__", None) or {"__name__": type(current).__module__}
    author = str(names["__name__"])
    return "" if author == home else author.replace(__name__, __package__ or "")


def _class(module: ModuleType, name: str) -> type:
    cls = getattr(module, name, None)
    if not isinstance(cls, type):
        raise UnsupportedMegatronError(
            f"{module.__name__} has no class {name}: it is a stub, or is being imported right now "
            "(call apply() before or after that)"
        )
    return cls


def _named(name: Union[type, str]) -> tuple[type, Found]:
    """The class and method that an entry of `also` names."""
    import inspect

    methods: Iterable[str] = ("_preprocess", "forward")
    if isinstance(name, str):
        module, _, path = name.partition(":")
        cls, _, method = path.partition(".")
        methods = [method] if method else methods
        try:
            name = _class(importlib.import_module(module), cls)
        except ImportError as error:
            raise UnsupportedMegatronError(f"apply(also=...): {module}: {error}") from error
    for method in methods:
        if method in name.__dict__:
            names = tuple(inspect.signature(getattr(name, method)).parameters)[1:]
            return name, Found(Site("also", name.__module__, name.__qualname__, method), "", names)
    raise UnsupportedMegatronError(
        f"apply(also=...): {name.__qualname__} has no {' or '.join(methods)} of its own; name the "
        "class that defines it, or the method, as 'module:Class.method'"
    )


def _eagle() -> list[str]:
    """Where ModelOpt's EAGLE-3, if it is loaded, embeds for the base model and for the draft."""
    module = "modelopt.torch.speculative.plugins.megatron_eagle"
    cls = getattr(sys.modules.get(module), "_DynamicEagleGPTModel", None)
    names = "_base_model_forward", "_get_eagle_module_inputs", "pseudo_speculative_generate"
    return [f"{module}:{cls.__name__}.{name}" for name in names if name in vars(cls)] if cls else []


def _name(key: tuple[type, str]) -> str:
    return f"{key[0].__module__}.{key[0].__qualname__}.{key[1]}"


def _replace(targets: list[tuple[type, Found]]) -> list[tuple[type, str]]:
    """Replace the methods, all or none: whatever can fail has been done before."""
    with _lock:
        replaced = []
        for owner, found in targets:
            key = owner, found.site.method
            current, patch = owner.__dict__[key[1]], _patches.get(key)
            if found.native == "this fix" or _state(current, patch) == "patched":
                continue
            if patch:
                patch.active = False  # lost, or below something that hides it
            patch = _patches[key] = _Patch(current, found)
            setattr(*key, patch.replacement)
            replaced.append(key)
        return replaced


def _restore(keys: list[tuple[type, str]]) -> tuple[str, ...]:
    with _lock:
        restored = []
        for key in keys:
            patch = _patches.pop(key, None)
            if patch is None:
                continue
            patch.active = False
            if key[0].__dict__.get(key[1]) is patch.replacement:
                setattr(*key, patch.original)
                restored.append(_name(key))
            else:
                warnings.warn(
                    f"{_name(key)} carries a later patch, which stays; the fix below it is off",
                    stacklevel=3,
                )
        return tuple(restored)
