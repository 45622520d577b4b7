# SPDX-License-Identifier: Apache-2.0
"""The call sites: the methods of megatron-core that embed tokens for a decoder.

They are recognized in the code objects of compiled source files. Nothing here runs these files, or
imports torch or megatron-core.
"""

import functools
import importlib.util
import re
from pathlib import Path
from types import CodeType
from typing import NamedTuple, Optional

__all__ = [
    *("NEWEST", "OLDEST", "SITES", "Found", "Site", "UnsupportedMegatronError"),
    *("installed_root", "supported", "version"),
]

#: The releases this package is tested with, both included.
OLDEST, NEWEST = (0, 12), (0, 19)


class UnsupportedMegatronError(RuntimeError):
    """megatron-core is missing, outside the supported range, or its code is not recognized."""


class Site(NamedTuple):
    """A method that embeds tokens for a decoder, or hands the embedding on to one that does.

    Attributes:
        role: what it does; each role is played by one of its sites in any release.
        module: dotted name of the module that defines the class.
        cls: the class.
        method: the method.
        embeds: ``"self"`` if it calls ``self.embedding``, ``"argument"`` if its argument
            ``embedding``, ``"hands on"`` if it passes that argument on to the row before.
        optional: whether a release may lack the role.
    """

    role: str
    module: str
    cls: str
    method: str
    embeds: str = "self"
    optional: bool = False

    @property
    def name(self) -> str:
        """``Class.method``."""
        return f"{self.cls}.{self.method}"


_MODELS, _MTP = "megatron.core.models", "megatron.core.transformer.multi_token_prediction"
_HYBRID, _LAYER = f"{_MODELS}.hybrid.hybrid_model", "MultiTokenPredictionLayer"

#: To add a release whose code has moved, add the place it moved to: see CONTRIBUTING.md.
SITES = (
    Site("GPT decoder", f"{_MODELS}.gpt.gpt_model", "GPTModel", "forward"),  # 0.12
    Site("GPT decoder", f"{_MODELS}.gpt.gpt_model", "GPTModel", "_preprocess"),  # 0.13 on
    Site("hybrid decoder", f"{_MODELS}.mamba.mamba_model", "MambaModel", "forward"),  # to 0.17
    Site("hybrid decoder", _HYBRID, "HybridModel", "forward"),  # 0.18 on
    Site("hybrid decoder", _HYBRID, "HybridModel", "_preprocess"),  # pull requests 4798, 4942
    Site("MTP", _MTP, "MultiTokenPredictionBlock", "forward", "argument"),  # 0.12, 0.13
    Site("MTP", _MTP, _LAYER, "_get_embeddings", "argument"),  # 0.14 on
    # Reaches a `_get_embeddings` that somebody replaced on an instance or in a subclass.
    Site("MTP layer", _MTP, _LAYER, "forward", "hands on", optional=True),  # 0.14 on
    Site("MTP single step", _MTP, _LAYER, "forward_single_position", "argument", True),  # 0.17 on
)


class Found(NamedTuple):
    """A call site as a source tree has it.

    Attributes:
        site: the table's row.
        native: what the tree does by itself: ``"no shard"`` (the bug), ``"own scatter"``
            (Megatron-LM #5628, #6256) or ``"this fix"`` (the patches of ``diff``).
        parameters: the names of the method's positional parameters, after ``self``.
    """

    site: Site
    native: str
    parameters: tuple[str, ...]


@functools.cache  # a process imports one version of a file, whatever becomes of it on disk
def supported(root: Path) -> tuple[tuple[Found, ...], str]:
    """Find the call sites in a source tree.

    Args:
        root: the folder that holds ``megatron/core``.

    Returns:
        tuple: one entry a role, in the table's order, and a remark: empty, or that the release is
        newer than what this package is tested with.

    Raises:
        UnsupportedMegatronError: the release is too old, a file cannot be read, or a role is not
            recognized; the message names the file and the methods.
    """
    release = version(root)
    shown, oldest, newest = (".".join(map(str, v)) for v in (release, OLDEST, NEWEST))
    if release[:2] < OLDEST:
        raise UnsupportedMegatronError(
            f"megatron-core {shown} at {root} is older than {oldest}: megatron-sp-fix supports "
            f"{oldest} to {newest}"
        )
    found: list[Found] = []
    for role in dict.fromkeys(site.role for site in SITES):
        sites = [site for site in SITES if site.role == role]
        codes = {site: _code(root, site) for site in sites}
        matches = [f for site, code in codes.items() if code and (f := _recognize(site, code))]
        if sites[0].embeds == "hands on":  # it does what the method does that it hands on to
            found += [match._replace(native=found[-1].native) for match in matches]
        elif len(matches) == 1:
            found += matches
        elif matches or not sites[0].optional or any(codes.values()):
            what = "self.embedding" if sites[0].embeds == "self" else "embedding"
            raise UnsupportedMegatronError(
                f"megatron-core {shown} at {root}: looked for one call of `{what}(input_ids=..., "
                f"position_ids=...)` in {' or '.join(f'{s.module}: {s.name}' for s in sites)}, "
                f"found {len(matches)}: name the method of this fork in apply(also=...), or add a "
                "row to megatron_sp_fix/sites.py"
            )
    remark = f"megatron-core {shown} is newer than {newest}, the newest that was tested"
    return tuple(found), remark if release[:2] > NEWEST else ""


def installed_root() -> Path:
    """The folder that holds the installed ``megatron/core``.

    Raises:
        UnsupportedMegatronError: megatron-core is not installed.
    """
    try:
        spec = importlib.util.find_spec("megatron.core")
    except (ModuleNotFoundError, ValueError):  # ValueError: a stub without a spec is in its place
        spec = None
    if spec is None or spec.origin is None:
        raise UnsupportedMegatronError(
            "megatron-core is not installed in this environment: pip install megatron-core"
        )
    return Path(spec.origin).parents[2]


def version(root: Path) -> tuple[int, ...]:
    """Read ``(major, minor, patch)`` from ``megatron/core/package_info.py`` of a source tree.

    Raises:
        UnsupportedMegatronError: the tree has no such file, or the file no version.
    """
    path = root / "megatron/core/package_info.py"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    numbers = re.findall(r"^(?:MAJOR|MINOR|PATCH)\s*=\s*(\d+)", text, re.M)
    if len(numbers) != 3:
        raise UnsupportedMegatronError(
            f"no megatron-core source tree at {root}: {path} does not state a version"
        )
    return tuple(map(int, numbers))


def _code(root: Path, site: Site) -> Optional[CodeType]:
    """The code object of a site's method, or None if the tree has no such file or method."""
    code: Optional[CodeType] = _compile(root / (site.module.replace(".", "/") + ".py"))
    for name in (site.cls, site.method):
        inner = [c for c in code.co_consts if isinstance(c, CodeType)] if code else []
        code = next((c for c in inner if c.co_name == name), None)
    return code


@functools.cache
def _compile(path: Path) -> Optional[CodeType]:
    try:
        return compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except FileNotFoundError:
        return None
    except (SyntaxError, ValueError) as error:  # ValueError: cannot be decoded
        raise UnsupportedMegatronError(f"{path} cannot be read by this Python: {error}") from error


def _recognize(site: Site, code: CodeType) -> Optional[Found]:
    """What a method does by itself, or None if it does not embed as the table says."""
    arguments = code.co_varnames[1 : code.co_argcount]
    call = ("input_ids", "position_ids") in code.co_consts  # the keywords of a call
    names = (*code.co_names, *code.co_consts)
    fixed = "embed_tokens_for_decoder" in names
    if site.embeds == "hands on":
        return Found(site, "hands on", arguments) if "embedding" in arguments else None
    if not fixed and not (call and "embedding" in (names if site.embeds == "self" else arguments)):
        return None
    scatters = "scatter_to_sequence_parallel" in names
    native = "this fix" if fixed else "own scatter" if scatters else "no shard"
    return Found(site, native, arguments)
