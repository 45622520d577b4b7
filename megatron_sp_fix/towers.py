# SPDX-License-Identifier: Apache-2.0
"""Which language models in a built model are towers, which of them the fix covers, and why not."""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Optional

from .runtime import SiteStatus, covers, status
from .sites import SITES, Site

__all__ = ["NotCoveredError", "Tower", "audit"]


class NotCoveredError(RuntimeError):
    """A tower would run on the whole sequence; the message names it and the reason."""


@dataclass(frozen=True)
class Tower:
    """A language model found in a model.

    Attributes:
        name: its name in the model, ``""`` for the model itself.
        cls: its class.
        embedding: its embedding's class; empty if this stage does not embed.
        kind: ``"tower"`` or ``"plain LM"``.
        covered: whether a standalone forward of it runs on shards, or has nothing to shard.
        reason: why, in a sentence.
    """

    name: str
    cls: str
    embedding: str
    kind: str
    covered: bool
    reason: str


def audit(model: Any, *, strict: bool = False) -> tuple[Tower, ...]:
    """List the language models in a built model. Runs nothing and changes nothing.

    Args:
        model: a ``torch.nn.Module``, or a list of them (virtual pipeline stages).
        strict: raise if a tower is not covered.

    Returns:
        tuple[Tower, ...]: one entry a language model; those of further stages have their index in
        the name.

    Raises:
        NotCoveredError: with `strict`, a tower is not covered.
    """
    from megatron.core.models.common.language_module.language_module import LanguageModule

    stages = list(model) if isinstance(model, Iterable) else [model]
    sites = {site.name: site for site in status().sites}
    towers = tuple(
        _tower(f"{index}.{name}".rstrip(".") if len(stages) > 1 else name, module, sites)
        for index, stage in enumerate(stages)
        for name, module in stage.named_modules()
        if isinstance(module, LanguageModule) and hasattr(module, "decoder")
    )
    missed = [tower for tower in towers if not tower.covered]
    if strict and missed:
        raise NotCoveredError("; ".join(f"{t.name or t.cls} ({t.cls}): {t.reason}" for t in missed))
    return towers


def _tower(name: str, module: Any, sites: dict[str, SiteStatus]) -> Tower:
    embedding = getattr(module, "embedding", None)
    plain = embedding is None or bool(getattr(embedding, "scatter_to_sequence_parallel", False))
    if embedding is None:
        covered, reason = True, "this stage does not embed"
    elif plain:
        covered, reason = True, "its embedding shards by itself"
    elif not module.config.sequence_parallel:
        covered, reason = True, "sequence parallelism is off, so there is nothing to shard"
    else:
        covered, reason = _own_methods(module) or _coverage(type(module), sites)
        mtp = [site for name, site in sites.items() if "MultiTokenPrediction" in name]
        if covered and getattr(module, "mtp_process", False) and not all(s.patched for s in mtp):
            covered, reason = False, "its main forward is covered, its MTP layers are not"
    return Tower(
        name,
        type(module).__name__,
        "" if embedding is None else type(embedding).__name__,
        "plain LM" if plain and embedding is not None else "tower",
        covered,
        reason,
    )


def _own_methods(module: Any) -> Optional[tuple[bool, str]]:
    """Not covered, if the instance was given a method that embeds; None if it was not."""
    for method in ("forward", "_preprocess"):
        calls = _calls(_body(module, method)) if method in module.__dict__ else set()
        if any(call.endswith(".embedding") for call in calls):
            return False, f"this instance has a {method} of its own, which embeds by itself"
    return None


def _coverage(cls: type, sites: dict[str, SiteStatus]) -> tuple[bool, str]:
    """Whether a tower of this class reaches a patched site, from the code that it runs."""
    site = next((s for s in SITES if s.name in sites and issubclass(cls, _owner(s))), None)
    if site is None:
        return False, f"{cls.__name__} is not a model that megatron-sp-fix knows"
    definer = _definer(cls, "forward")
    if definer is not _owner(site):
        body = _body(definer, "forward")
        calls = _calls(body)
        if not {f"self.{site.method}", f"super().{site.method}", "super().forward"} & calls:
            return False, f"{definer.__name__}.forward does not call {site.name}"
        if _shards(body):
            return False, f"{definer.__name__}.forward shards by itself, which would be done twice"
    definer = _definer(cls, site.method)
    if definer is not _owner(site):
        calls = _calls(_body(definer, site.method))
        if not {f"super().{site.method}", f"{site.cls}.{site.method}"} & calls:
            if covers(definer, site.method):
                return True, f"{definer.__name__}.{site.method} is patched by apply(also=...)"
            return False, (
                f"{definer.__name__} overrides {site.method} without calling the original: try "
                f"apply(also=[{definer.__name__}])"
            )
    if not sites[site.name].patched:
        return False, f"{site.name} is not patched: call megatron_sp_fix.apply()"
    return True, f"{site.name} is patched"


def _owner(site: Site) -> type:
    try:
        owner: type = getattr(importlib.import_module(site.module), site.cls)
    except ImportError:
        return type("Missing", (), {})  # no class is a subclass of it
    return owner


def _definer(cls: type, method: str) -> type:
    return next(base for base in cls.__mro__ if method in base.__dict__)


def _body(owner: Any, method: str) -> Optional[ast.FunctionDef]:
    try:
        source = inspect.getsource(inspect.unwrap(owner.__dict__[method]))
        tree = ast.parse(textwrap.dedent(source))
    except (OSError, TypeError, SyntaxError):
        return None
    return tree.body[0] if isinstance(tree.body[0], ast.FunctionDef) else None


def _calls(body: Optional[ast.FunctionDef]) -> set[str]:
    nodes = ast.walk(body) if body else ()
    return {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}


def _shards(body: Optional[ast.FunctionDef]) -> bool:
    """Whether the method itself, and no function inside it, scatters the decoder's input."""
    for statement in body.body if body else ():
        inner = {
            id(node)
            for function in ast.walk(statement)
            if isinstance(function, (ast.FunctionDef, ast.Lambda))
            for node in ast.walk(function)
        }
        for node in ast.walk(statement):
            if (
                isinstance(node, ast.Assign)
                and id(node) not in inner
                and "scatter_to_sequence_parallel_region" in ast.unparse(node.value)
                and "decoder_input" in ast.unparse(node.targets[0])
            ):
                return True
    return False
