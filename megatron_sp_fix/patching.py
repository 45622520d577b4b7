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
from itertools import islice
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple, Optional, Union

from .sites import Site, UnsupportedMegatronError, installed_root, supported

_lock = threading.RLock()
_patches: dict[tuple[type, str], "_Patch"] = {}  # by class and name of the method
_undo: list["_Patch"] = []  # what `applied` blocks, in whatever thread, have replaced
_open = 0  # how many of them are open
_removed = False  # whether modules that are imported from now on stay as they are


class _Patch:
    """A replaced method: the very object that stood in the class, and what stands there now.

    Once removed it only passes calls on, since somebody's later patch may still call it.
    """

    fix: Any = None  # embedding.py, imported late: when the hook runs, megatron-core is half there

    def __init__(self, cls: type, site: Site) -> None:
        self.cls, self.method, self.active = cls, site.method, True
        self.name = f"{cls.__module__}.{cls.__qualname__}.{self.method}"
        original = self.original = self.current
        call: Any = original if type(original) is FunctionType else partial(_call, original)
        if (twin := call) is original:
            # torch.compile keeps results by code object; what it compiled for a plain LM reads the
            # submodule, past the stand-in. So calls with one run a copy with its own code object.
            twin = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
            twin.__defaults__, twin.__kwdefaults__ = call.__defaults__, call.__kwdefaults__
        patch, names = self, site.parameters  # `self` below is the model, which a call may name

        def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
            if (fix := patch.fix) is None:
                from . import embedding as fix

                _Patch.fix = fix
            given = {**dict(zip(names, args)), **kwargs} if args else kwargs
            if not patch.active or given.get("decoder_input") is not None:
                pass
            elif site.embeds == "self.embedding":
                if fix.needs_shard(self, getattr(self, "embedding", None)):
                    method = partial(twin, self, *args, **kwargs)
                    context = given.get("inference_context") or given.get("inference_params")
                    return fix.sharding(self, method, context, site.native)
            elif given.get("embedding") is not None and given.get("hidden_states") is not None:
                mine = fix.sharding_rows(self, given["embedding"], given["hidden_states"])
                if "embedding" in kwargs:
                    kwargs["embedding"] = mine
                else:
                    at = names.index("embedding")
                    args = (*args[:at], mine, *args[at + 1 :])
            return call(self, *args, **kwargs)

        self.replacement = update_wrapper(replacement, original)

    @property
    def current(self) -> Any:
        """What stands in the class now, as it is."""
        return vars(self.cls).get(self.method)


def _call(method: Any, owner: Any, *args: Any, **kwargs: Any) -> Any:
    """Call something that stood in a class as Python would."""
    bind = getattr(type(method), "__get__", None)
    return (bind(method, owner, type(owner)) if bind else method)(*args, **kwargs)


class SiteStatus(NamedTuple):
    """What one call site, ``Class.method``, does in this process (in a tree: `state` is `native`).

    `native` is as of ``sites.Site``. `state` is ``"patched"`` if a call reaches this package,
    ``"this fix"`` (in its source), ``"not patched"``, ``"not imported"``, or ``"cannot tell"`` if a
    replacement hides what it calls. `by` is the module of whoever replaced the method last.
    """

    name: str
    native: str
    state: str
    by: str


class Status(NamedTuple):
    """A megatron-core: its version, folder and call sites; `remark`, if it is not tested yet."""

    version: str
    root: str
    sites: tuple[SiteStatus, ...]
    remark: str


def apply(*, also: Iterable[Union[type, str]] = ()) -> tuple[str, ...]:
    """Make every standalone forward of a language tower run on shards under sequence parallelism.

    Replaces ``GPTModel._preprocess``, its siblings in ``MambaModel``, ``HybridModel`` and MTP and,
    if it is loaded, those of ModelOpt's EAGLE-3, and returns what it replaced. Works before or
    after models are built, and leaves what has the fix in its source. Every rank must call it.

    Args:
        also: classes with a ``_preprocess`` or ``forward`` of their own that calls
            ``self.embedding``, or strings ``"module:Class"`` and ``"module:Class.method"``. A
            method with a parameter ``decoder_input`` is acted on when that is None, else always.

    Raises:
        UnsupportedMegatronError: megatron-core is missing, too old or not recognized, or what
            `also` names is not there. Nothing has been replaced then.
    """
    global _removed
    found, remark, _ = supported(installed_root())
    if remark:
        warnings.warn(remark, stacklevel=2)
    patches = _apply(found, also)
    _removed = False
    _undo.clear()  # it stays, whatever `applied` blocks are open
    return tuple(patch.name for patch in patches)


def apply_to(module: str, also: Iterable[str] = ()) -> tuple[str, ...]:
    """Do what :func:`apply` does for one module, which has just been loaded; import no other."""
    rows = [row for row in supported(installed_root())[0] if row.module == module]
    return () if _removed else tuple(patch.name for patch in _apply(rows, also, f"{module}:"))


def _apply(rows: Iterable[Site], also: Iterable[Union[type, str]], only: str = "") -> list[_Patch]:
    targets = []
    for row in rows:
        try:
            module = importlib.import_module(row.module)
        except ImportError:  # as 0.12's MambaModel without Transformer Engine: nobody can use it
            continue
        if not (cls := _owner(module, row.cls, row.method)):
            raise UnsupportedMegatronError(
                f"{row.module} has no class {row.cls} with that method: it is a stub, or is being "
                "imported just now (call apply() before or after that)"
            )
        targets.append((cls, row))
    also = [also] if isinstance(also, (str, type)) else also  # a lone name, not its letters
    targets += [_also(name) for name in (*also, *_eagle()) if str(name).startswith(only)]
    replaced = []
    with _lock:  # whatever can fail has been done: all are replaced, or none
        for cls, site in targets:
            key = cls, site.method
            one = _patches.get(key)
            if site.native == "this fix" or _state(one) == "patched":
                continue
            if one is None or id(one.current) not in map(id, (one.original, one.replacement)):
                if one:
                    one.active = False  # somebody's patch is on top of it
                one = _patches[key] = _Patch(cls, site)
            one.active = True  # again, if it was removed: somebody may still hold a bound method
            setattr(*key, one.replacement)
            replaced.append(one)
    return replaced


def remove() -> tuple[str, ...]:
    """Put back the very methods that were replaced, and return their names.

    Where somebody has patched one since, theirs stays, with this fix off below; a warning names it.
    """
    global _removed
    _removed = True
    return _restore([*_patches.values()])


@contextmanager
def applied(*, also: Iterable[Union[type, str]] = ()) -> Iterator[None]:
    """Apply in a ``with`` block, or until the last open one ends; recomputation belongs inside."""
    global _open
    patches = _apply(supported(installed_root())[0], also)
    with _lock:
        _undo.extend(patches)
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if _open == 0:
                _restore(_undo)
                _undo.clear()


def status(root: Optional[Path] = None) -> Status:
    """Describe the installed megatron-core, or the one in a folder `root`, and import none of it.

    Raises:
        UnsupportedMegatronError: megatron-core is missing, too old or not recognized.
    """
    tree = root or installed_root()
    sites, remark, release = (supported.__wrapped__ if root else supported)(tree)
    rows = []
    for site in sites:
        state, by = "not imported", ""
        if root or site.native == "this fix":
            state = site.native
        elif cls := _owner(sys.modules.get(site.module), site.cls, site.method):
            current = vars(cls)[site.method]
            state = _state(_patches.get((cls, site.method)))
            plain = type(current) is FunctionType  # other objects may forward `__globals__`
            home = current.__globals__.get("__name__", "") if plain else type(current).__module__
            by = {site.module: "", __name__: "megatron_sp_fix"}.get(home, home)
        rows.append(SiteStatus(site.name, site.native, state, by))
    return Status(release, str(tree), tuple(rows), remark)


def _state(patch: Optional[_Patch]) -> str:
    """Whether calling what stands in a class reaches the replacement, as far as can be seen."""
    if patch is None or not patch.active or patch.current is patch.original:
        return "not patched"
    found = [patch.current]
    for it in islice(found, 99):  # it grows here; a mock has attributes of any name, without end
        if it is patch.replacement:
            return "patched"
        found += gc.get_referents(*(getattr(it, "__closure__", None) or ()))  # cells' contents
        if type(it) is FunctionType:  # its `__wrapped__` need not be what it calls
            called = map(it.__globals__.get, it.__code__.co_names)
            found += [each for each in called if type(each) is FunctionType]
        else:
            found += [getattr(it, n) for n in ("__wrapped__", "__func__", "func") if hasattr(it, n)]
    return "cannot tell"


def _owner(module: Any, name: str, method: str) -> Optional[type]:
    """The class of that name in a module, or the one of its bases that has the method."""
    classes = getattr(getattr(module, name, None), "__mro__", ())
    return next((cls for cls in classes if method in vars(cls)), None)


def _also(entry: Any) -> tuple[type, Site]:
    """The class and method that an entry of `also` names."""
    import inspect

    cls, methods = entry, ["_preprocess", "forward"]
    if isinstance(entry, str):
        module, _, path = entry.partition(":")
        name, _, method = path.partition(".")
        methods = [method] if method else methods
        try:
            cls = getattr(importlib.import_module(module), name, None)
        except (ImportError, TypeError, ValueError) as error:  # TypeError: relative; else empty
            raise UnsupportedMegatronError(f"also: cannot import {module!r}: {error}") from error
    for method in methods:
        if isinstance(cls, type) and callable(vars(cls).get(method)):
            parameters = inspect.signature(getattr(cls, method)).parameters.values()
            names = tuple(p.name for p in parameters if p.kind < p.VAR_POSITIONAL)[1:]
            return cls, Site("also", cls.__module__, cls.__qualname__, method, parameters=names)
    raise UnsupportedMegatronError(
        f"also: {entry!r} names no class with a {' or '.join(methods)} of its own: name the class "
        "that has it, or another method as 'module:Class.method'"
    )


def _eagle() -> list[str]:
    """Where ModelOpt's EAGLE-3, if it is loaded, embeds for the base model and for the draft."""
    module = "modelopt.torch.speculative.plugins.megatron_eagle"
    cls = getattr(sys.modules.get(module), "_DynamicEagleGPTModel", None)
    names = "_base_model_forward", "_get_eagle_module_inputs", "pseudo_speculative_generate"
    return [f"{module}:{cls.__name__}.{name}" for name in names if name in vars(cls)] if cls else []


def _restore(patches: list[_Patch]) -> tuple[str, ...]:
    with _lock:
        active = [patch for patch in patches if patch.active]
        ours = [patch for patch in active if patch.current is patch.replacement]
        for patch in active:
            patch.active = False
        for patch in ours:
            setattr(patch.cls, patch.method, patch.original)
    for patch in (one for one in active if one not in ours):  # last: under `-W error` it raises
        warnings.warn(f"{patch.name}: a later patch stays; the fix below is off", stacklevel=3)
    return tuple(patch.name for patch in ours)
