# SPDX-License-Identifier: Apache-2.0
"""The call sites: every place in megatron-core that embeds tokens for a decoder.

One table, read by the runtime patch, the source patch, `status` and `audit`. Sites are found in the
syntax tree of a megatron-core source tree, so nothing here imports torch or megatron.
"""

import ast
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, TypeGuard

__all__ = [
    "OLDEST",
    "NEWEST",
    "SITES",
    "Found",
    "Site",
    "UnsupportedMegatronError",
    "find",
    "find_in",
    "installed_root",
    "version",
]

#: The releases this package is tested with, both included.
OLDEST, NEWEST = (0, 12), (0, 19)


class UnsupportedMegatronError(RuntimeError):
    """megatron-core is missing, outside the supported range, or its code is not recognized."""


@dataclass(frozen=True)
class Site:
    """A method that embeds tokens for a decoder.

    Attributes:
        role: what the method does. Each role is played by one of its sites in any release.
        module: dotted name of the module that defines the class.
        cls: the class.
        method: the method.
        embeds: what the method calls to embed: ``self.embedding``, or its argument ``embedding``.
        optional: True if a release may lack the role.
    """

    role: str
    module: str
    cls: str
    method: str
    embeds: str = "self.embedding"
    optional: bool = False

    @property
    def name(self) -> str:
        """``Class.method``."""
        return f"{self.cls}.{self.method}"

    @property
    def path(self) -> str:
        """The module's file, relative to the folder that holds ``megatron/``."""
        return self.module.replace(".", "/") + ".py"


_GPT = "megatron.core.models.gpt.gpt_model"
_MTP = "megatron.core.transformer.multi_token_prediction"

#: To add a release whose code has moved, add the place it moved to: see CONTRIBUTING.md.
SITES = (
    Site("GPT decoder", _GPT, "GPTModel", "forward"),  # 0.12
    Site("GPT decoder", _GPT, "GPTModel", "_preprocess"),  # 0.13 on
    Site(
        "hybrid decoder", "megatron.core.models.mamba.mamba_model", "MambaModel", "forward"
    ),  # -0.17
    Site("hybrid decoder", "megatron.core.models.hybrid.hybrid_model", "HybridModel", "forward"),
    Site("MTP", _MTP, "MultiTokenPredictionBlock", "forward", "embedding"),  # 0.12 and 0.13
    Site("MTP", _MTP, "MultiTokenPredictionLayer", "_get_embeddings", "embedding"),  # 0.14 on
    Site(  # 0.17 on
        "MTP single step",
        _MTP,
        "MultiTokenPredictionLayer",
        "forward_single_position",
        "embedding",
        optional=True,
    ),
)


@dataclass(frozen=True)
class Found:
    """A call site as one source tree has it.

    Attributes:
        site: the table's row.
        parameters: names of the method's positional parameters, after ``self``.
        form: what the tree does by itself: ``"none"`` (the bug), ``"native"`` (megatron-core's own
            scatter, Megatron-LM #5628 and #6256) or ``"source"`` (patched by `diff`).
        call: the statement ``decoder_input = ...embedding(...)``.
        scatter: the native scatter, if there is one.
        mask: the statement that shards the padding mask, if there is one.
        takes_mask: whether the method has a parameter ``padding_mask``.
    """

    site: Site
    parameters: tuple[str, ...]
    form: str
    call: ast.Assign
    scatter: Optional[ast.If] = None
    mask: Optional[ast.Assign] = None
    takes_mask: bool = False


def find(root: Path) -> list[Found]:
    """Find the call sites in a source tree.

    Args:
        root: the folder that holds ``megatron/core``.

    Returns:
        list[Found]: one entry a role, in the table's order.

    Raises:
        UnsupportedMegatronError: a role is not recognized; the message names file and method.
    """
    trees: dict[str, dict[str, ast.ClassDef]] = {}
    for path in dict.fromkeys(site.path for site in SITES):
        if (root / path).is_file():
            body = ast.parse((root / path).read_text(encoding="utf-8")).body
            trees[path] = {node.name: node for node in body if isinstance(node, ast.ClassDef)}

    found: list[Found] = []
    for role in dict.fromkeys(site.role for site in SITES):
        sites = [site for site in SITES if site.role == role]
        methods = {site: _method(trees.get(site.path, {}).get(site.cls), site) for site in sites}
        matches = [match for site, node in methods.items() if node and (match := _read(site, node))]
        if len(matches) == 1:
            found += matches
        elif matches or any(methods.values()) or not all(site.optional for site in sites):
            places = " or ".join(f"{site.path}: {site.name}" for site in sites)
            raise UnsupportedMegatronError(
                f"megatron-core {'.'.join(map(str, version(root)))} at {root}: did not find one "
                f"call of `{sites[0].embeds}(input_ids=..., position_ids=...)` in {places}. "
                f"{_supported()}"
            )
    return found


def find_in(source: str, site: Site) -> Found:
    """Find a call site in a class outside the table, where handing a shard in skips nothing else.

    Args:
        source: the class's source.
        site: its place.

    Returns:
        Found: the call site.

    Raises:
        UnsupportedMegatronError: the method cannot be patched; the message says why.
    """
    node = ast.parse(source).body[0]
    method = _method(node if isinstance(node, ast.ClassDef) else None, site)
    found = _read(site, method) if method else None
    if method is None or found is None:
        raise UnsupportedMegatronError(
            f"{site.name} cannot be patched: it has no one statement "
            "`decoder_input = self.embedding(input_ids=..., position_ids=...)`"
        )
    if "decoder_input" not in found.parameters:
        raise UnsupportedMegatronError(
            f"{site.name} cannot be patched: it takes no decoder_input to hand the shard in by"
        )
    block = next(block for block in _blocks(method) if found.call in block)
    for statement in block[block.index(found.call) + 1 :]:
        if statement is not found.scatter and any(
            isinstance(name, ast.Name) and name.id == "decoder_input"
            for name in ast.walk(statement)
        ):
            raise UnsupportedMegatronError(
                f"{site.name} cannot be patched: a shard handed in would skip line "
                f"{statement.lineno} of {site.cls}, `{ast.unparse(statement).splitlines()[0]}`"
            )
    return found


def _method(cls: Optional[ast.ClassDef], site: Site) -> Optional[ast.FunctionDef]:
    for node in cls.body if cls else ():
        if isinstance(node, ast.FunctionDef) and node.name == site.method:
            return node
    return None


def _read(site: Site, method: ast.FunctionDef) -> Optional[Found]:
    """Find the statement that embeds, and what follows it in the same block."""
    matches = []
    for block in _blocks(method):
        for index, statement in enumerate(block):
            form = _embeds(statement, site)
            if form is None:
                continue
            assert isinstance(statement, ast.Assign)
            scatter = next((s for s in block[index:] if _is_scatter(s)), None)
            masks = [m for s in block[index:] for m in ast.walk(s) if _is_mask(m)]
            matches.append(
                Found(
                    site,
                    tuple(a.arg for a in (*method.args.posonlyargs, *method.args.args))[1:],
                    "native" if scatter else form,
                    statement,
                    scatter,
                    masks[0] if masks else None,
                    any(
                        a.arg == "padding_mask"
                        for a in (*method.args.args, *method.args.kwonlyargs)
                    ),
                )
            )
    return matches[0] if len(matches) == 1 else None


def _blocks(node: ast.AST) -> list[list[ast.stmt]]:
    blocks = []
    for child in ast.walk(node):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(child, field, None)
            if isinstance(block, list):
                blocks.append(block)
    return blocks


def _embeds(statement: ast.stmt, site: Site) -> Optional[str]:
    """``"none"`` or ``"source"``, without or with the source patch, if this is the statement."""
    if not (
        isinstance(statement, ast.Assign)
        and ast.unparse(statement.targets[0]) == "decoder_input"
        and isinstance(statement.value, ast.Call)
    ):
        return None
    call = statement.value
    function = ast.unparse(call.func)
    if function in ("embed_for_decoder", "sharding_embedding(self, embedding)"):
        return "source"
    names = {keyword.arg for keyword in call.keywords}
    if function == site.embeds and not call.args and names == {"input_ids", "position_ids"}:
        return "none"
    return None


def _is_scatter(statement: ast.AST) -> TypeGuard[ast.If]:
    return (
        isinstance(statement, ast.If)
        and "scatter_to_sequence_parallel" in ast.unparse(statement.test)
        and any("decoder_input" in ast.unparse(s).split("=")[0] for s in statement.body)
    )


def _is_mask(node: ast.AST) -> TypeGuard[ast.Assign]:
    return (
        isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "padding_mask"
        and "scatter_to_sequence_parallel_region" in ast.unparse(node.value)
    )


def installed_root() -> Path:
    """The folder that holds the installed ``megatron/core``.

    Raises:
        UnsupportedMegatronError: megatron-core is not installed.
    """
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise UnsupportedMegatronError(
            f"megatron-core is not installed in this environment. {_supported()}"
        )
    return Path(spec.origin).parents[2]


def version(root: Path) -> tuple[int, ...]:
    """Read ``(major, minor, patch)`` from ``megatron/core/package_info.py`` of a source tree.

    Raises:
        UnsupportedMegatronError: the tree has no such file, or the file no version.
    """
    path = root / "megatron/core/package_info.py"
    if not path.is_file():
        raise UnsupportedMegatronError(f"no megatron-core source tree at {root}: no {path}")
    text = path.read_text(encoding="utf-8")
    numbers = [
        re.search(rf"^{part}\s*=\s*(\d+)", text, re.M) for part in ("MAJOR", "MINOR", "PATCH")
    ]
    if None in numbers:
        raise UnsupportedMegatronError(f"{path} does not state MAJOR, MINOR and PATCH")
    return tuple(int(number[1]) for number in numbers if number)


def _supported() -> str:
    oldest, newest = (".".join(map(str, release)) for release in (OLDEST, NEWEST))
    return f"megatron-sp-fix supports megatron-core {oldest} to {newest}."
