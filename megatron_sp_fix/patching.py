# SPDX-License-Identifier: Apache-2.0
"""Replace the methods that embed tokens in the megatron-core of this process, and put them back."""

import gc
import importlib
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, Optional, Union

from .sites import Found, Site, UnsupportedMegatronError, installed_root, supported, version

__all__ = ["SiteStatus", "Status", "applied", "apply", "apply_to", "remove", "status"]

_Key = tuple[type, str]  # a class and the name of its method
_lock = threading.RLock()
_patches: dict[_Key, "_Patch"] = {}
_undo: list[_Key] = []  # what `applied` blocks, in whatever thread, have replaced
_open = 0  # how many of them are open
_removed = False  # whether modules that are imported from now on stay as they are


class _Patch:
    """A replaced method: the very object that stood in the class, and what stands there now.

    Once removed it is not active: a later patch by somebody else may still call the replacement,
    which then only passes the call on.
    """

    def __init__(self, original: Any, found: Found) -> None:
        self.original, self.found, self.active = original, found, True
        self.fix: Any = None

        def replacement(owner: Any, *args: Any, **kwargs: Any) -> Any:
            return (self._sharded if self.active else self._call)(owner, args, kwargs)

        self.replacement = update_wrapper(replacement, original)

    def _sharded(self, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the original with an embedding that returns shards, where it needs one."""
        if self.fix is None:  # not before, since the hook runs while megatron-core is half loaded
            from . import embedding as fix

            self.fix = fix
        if self.found.site.embeds == "self.embedding":
            given = self._argument("decoder_input", args, kwargs) is not None
            if given or not self.fix.needs_shard(owner, getattr(owner, "embedding", None)):
                return self._call(owner, args, kwargs)
            context = self._argument("inference_context", args, kwargs)
            if context is None:
                context = kwargs.get("inference_params")  # its old name, by keyword alone
            call = partial(self._call, owner, args, kwargs)
            return self.fix.sharding(owner, call, context, self.found.native)
        embedding = self._argument("embedding", args, kwargs)
        hidden_states = self._argument("hidden_states", args, kwargs)
        if embedding is not None and hidden_states is not None:
            embedding = self.fix.sharding_rows(owner, embedding, hidden_states)
            at = self.found.parameters.index("embedding")
            if at < len(args):
                args = (*args[:at], embedding, *args[at + 1 :])
            else:
                kwargs["embedding"] = embedding
        return self._call(owner, args, kwargs)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = self.found.parameters
        at = names.index(name) if name in names else len(args)
        return args[at] if at < len(args) else kwargs.get(name)

    def _call(self, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the original as Python would if it still stood in the class."""
        if type(self.original) is FunctionType:
            return self.original(owner, *args, **kwargs)
        bind = getattr(type(self.original), "__get__", None)
        method = bind(self.original, owner, type(owner)) if bind else self.original
        return method(*args, **kwargs)


class SiteStatus(NamedTuple):
    """What one call site does in this process.

    Attributes:
        name: ``Class.method``.
        native: what the installed code does by itself: ``"no shard"`` (the bug), ``"own scatter"``
            (megatron-core's) or ``"this fix"`` (patched by ``diff``).
        state: ``"patched"`` if a call of the method reaches this package, ``"this fix"``,
            ``"not patched"``, ``"not imported"``, or ``"cannot tell"`` if the method was replaced
            by something that hides what it calls.
        by: the module of whoever replaced the method last; empty if nobody did.
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

    Replaces ``GPTModel._preprocess``, its siblings in ``MambaModel``, ``HybridModel`` and MTP and,
    if it is loaded, those of ModelOpt's EAGLE-3. Works before or after models are built, and does
    nothing to a method that is patched in its source. Every rank must call it.

    Args:
        also: classes with a ``_preprocess`` or ``forward`` of their own that embeds, or strings
            ``"module:Class"`` and ``"module:Class.method"``. A method with a parameter
            ``decoder_input`` is acted on when that is None, one without it always.

    Returns:
        tuple[str, ...]: the methods replaced by this call, as ``module.Class.method``.

    Raises:
        UnsupportedMegatronError: megatron-core is missing, too old or not recognized, or what
            `also` names is not there. Nothing has been replaced then.
    """
    found, remark = supported(installed_root())
    if remark:
        warnings.warn(remark, stacklevel=2)
    keys = _apply([*found], also)
    _undo.clear()  # it stays, whatever `applied` blocks are open
    return tuple(map(_name, keys))


def apply_to(module: str, also: Iterable[str] = ()) -> tuple[str, ...]:
    """Do what :func:`apply` does for one module, which has just been loaded; import no other."""
    rows = [row for row in supported(installed_root())[0] if row.site.module == module]
    return () if _removed else tuple(map(_name, _apply(rows, also, module)))


def _apply(rows: list[Found], also: Iterable[Union[type, str]], only: str = "") -> list[_Key]:
    global _removed
    targets = []
    for row in rows:
        try:
            module = importlib.import_module(row.site.module)
        except ImportError:  # as 0.12's MambaModel without Transformer Engine: nobody can use it
            continue
        targets.append((_class(module, row.site.cls, row.site.method), row))
    for name in (*also, *_eagle()):
        if not only or str(name).startswith(f"{only}:"):
            targets.append(_also(name))
    replaced: list[_Key] = []
    with _lock:  # whatever can fail has been done: all are replaced, or none
        for owner, found in targets:
            key = owner, found.site.method
            current, patch = vars(owner)[key[1]], _patches.get(key)
            if found.native == "this fix" or _state(current, patch) == "patched":
                continue
            if patch is None or not (current is patch.original or _reaches(current, patch)):
                if patch:
                    patch.active = False  # below something that hides it
                patch = _patches[key] = _Patch(current, found)
            patch.active = True
            if current is patch.original:
                setattr(*key, patch.replacement)
            replaced.append(key)
        _removed = False
    return replaced


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
    """Apply for the length of a ``with`` block, or of the last of several that overlap."""
    global _open, _removed
    before, keys = _removed, _apply([*supported(installed_root())[0]], also)
    with _lock:
        _undo.extend(keys)
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if _open == 0:
                _removed = before
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
        state, by = "not imported", ""
        if native == "this fix":
            state = native
        elif cls := _owner(sys.modules.get(site.module), site.cls, site.method):
            current = vars(cls)[site.method]
            state = _state(current, _patches.get((cls, site.method)))
            plain = type(current) is FunctionType  # other objects may forward `__globals__`
            home = current.__globals__.get("__name__", "") if plain else type(current).__module__
            by = {site.module: "", __name__: "megatron_sp_fix"}.get(home, home)
        rows.append(SiteStatus(site.name, native, state, by))
    return Status(".".join(map(str, version(root))), str(root), tuple(rows))


def _state(current: Any, patch: Optional[_Patch]) -> str:
    """Whether calling what stands in a class reaches the replacement, as far as can be seen."""
    if patch is None or not patch.active or current is patch.original:
        return "not patched"
    return "patched" if _reaches(current, patch) else "cannot tell"


def _reaches(current: Any, patch: _Patch) -> bool:
    left, seen = [current], set[int]()
    while left and len(seen) < 99:  # a mock has attributes of any name, without end
        one = left.pop(0)
        if one is patch.replacement:
            return True
        if id(one) not in seen:
            seen.add(id(one))
            left += gc.get_referents(*(getattr(one, "__closure__", None) or ()))  # cells' contents
            left += [getattr(one, name, None) for name in ("__wrapped__", "__func__", "func")]
    return False


def _owner(module: Any, name: str, method: str) -> Optional[type]:
    """The class of that name in a module, or the one of its bases that has the method."""
    classes = getattr(getattr(module, name, None), "__mro__", ())
    return next((cls for cls in classes if method in vars(cls)), None)


def _class(module: ModuleType, name: str, method: str = "__module__") -> type:
    if cls := _owner(module, name, method):
        return cls
    raise UnsupportedMegatronError(
        f"{module.__name__} has no class {name} with that method: it is a stub, or is being "
        "imported just now (call apply() before or after that)"
    )


def _also(name: Union[type, str]) -> tuple[type, Found]:
    """The class and method that an entry of `also` names."""
    import inspect

    methods = ["_preprocess", "forward"]
    if isinstance(name, str):
        module, _, path = name.partition(":")
        cls, _, method = path.partition(".")
        methods = [method] if method else methods
        try:
            name = _class(importlib.import_module(module), cls)
        except ImportError as error:
            raise UnsupportedMegatronError(f"also: {module} cannot be imported: {error}") from error
    for method in methods:
        if method in vars(name):
            names = tuple(inspect.signature(getattr(name, method)).parameters)[1:]
            return name, Found(Site("also", name.__module__, name.__qualname__, method), "", names)
    raise UnsupportedMegatronError(
        f"also: {name.__qualname__} has no {' or '.join(methods)} of its own: name the class that "
        "has it, or another method as 'module:Class.method'"
    )


def _eagle() -> list[str]:
    """Where ModelOpt's EAGLE-3, if it is loaded, embeds for the base model and for the draft."""
    module = "modelopt.torch.speculative.plugins.megatron_eagle"
    cls = getattr(sys.modules.get(module), "_DynamicEagleGPTModel", None)
    names = "_base_model_forward", "_get_eagle_module_inputs", "pseudo_speculative_generate"
    return [f"{module}:{cls.__name__}.{name}" for name in names if name in vars(cls)] if cls else []


def _name(key: _Key) -> str:
    return f"{key[0].__module__}.{key[0].__qualname__}.{key[1]}"


def _restore(keys: list[_Key]) -> tuple[str, ...]:
    restored: list[str] = []
    left: list[str] = []
    with _lock:
        for key in keys:
            patch = _patches[key]
            if patch.active:
                back = vars(key[0]).get(key[1]) is patch.replacement
                if back:
                    setattr(*key, patch.original)
                (restored if back else left).append(_name(key))
            patch.active = False
    for name in left:  # at the end, since under `-W error` it raises
        warnings.warn(f"{name}: a later patch stays; the fix below it is off", stacklevel=3)
    return tuple(restored)
