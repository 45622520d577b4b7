# SPDX-License-Identifier: Apache-2.0
"""The call sites: the methods of megatron-core that embed tokens for a decoder.

They are recognized in code objects, which are not run; torch and megatron-core are not imported.
"""

import functools
import importlib.util
import re
from pathlib import Path
from types import CodeType
from typing import NamedTuple, Optional

#: The releases this package is tested with, both included.
OLDEST, NEWEST = (0, 12), (0, 19)


class UnsupportedMegatronError(RuntimeError):
    """megatron-core is missing, too old, or its code is not recognized; the message says which."""


class Site(NamedTuple):
    """A method that embeds tokens, by ``self.embedding`` or an argument ``embedding``.

    A release has exactly one site of each `role`, or none if that is `optional`. As found in a
    source tree, `native` is what the tree does by itself: ``"no shard"`` (the bug), ``"own
    scatter"`` (Megatron-LM #5628, #6256) or ``"this fix"`` (the patches of ``diff``), and
    `parameters` are the method's positional ones after ``self``.
    """

    role: str
    module: str
    cls: str
    method: str
    embeds: str = "self.embedding"
    optional: bool = False
    native: str = ""
    parameters: tuple[str, ...] = ()

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
    Site("hybrid decoder", _HYBRID, "HybridModel", "_preprocess"),  # Megatron-LM #4798, #4942
    Site("MTP", _MTP, "MultiTokenPredictionBlock", "forward", "embedding"),  # 0.12, 0.13
    Site("MTP", _MTP, _LAYER, "_get_embeddings", "embedding"),  # 0.14 on
    # Hands on to `_get_embeddings`, which somebody may have replaced on an instance or a subclass.
    Site("hand on", _MTP, _LAYER, "forward", "embedding", True),  # 0.14 on
    Site("MTP single step", _MTP, _LAYER, "forward_single_position", "embedding", True),  # 0.17 on
)


@functools.cache  # what a process has imported stays, whatever becomes of the files
def supported(root: Path) -> tuple[tuple[Site, ...], str, str]:
    """Find the call sites in the source tree whose folder `root` holds ``megatron/core``.

    Returns one entry a role, in the table's order; a remark, empty unless the release is newer than
    what was tested; and the release. Raises if it is too old, or a file or role is not recognized.
    """
    release = version(root)
    where = f"megatron-core {dotted(release)} at {root}"
    found: list[Site] = []
    for role in dict.fromkeys(site.role for site in SITES):
        sites = [site for site in SITES if site.role == role]
        codes = [(site, code) for site in sites if (code := _code(root, site))]
        matches = [match for pair in codes for match in _recognize(*pair)]
        if role == "hand on":
            found += [match._replace(native=found[-1].native) for match in matches]
        elif len(matches) == 1:
            found += matches
        elif codes or not sites[0].optional:
            raise UnsupportedMegatronError(
                f"{where}: expected one of {', '.join(f'{s.module}: {s.name}' for s in sites)} to "
                f"call {sites[0].embeds}(input_ids=..., position_ids=...), found {len(matches)}; "
                "for a fork, add it to megatron_sp_fix/sites.py; finish a patch that half applied"
            )
    remark = f"{where} is newer than {dotted(NEWEST)}, the newest release that was tested"
    return tuple(found), remark if release[:2] > NEWEST else "", dotted(release)


def installed_root() -> Path:
    """The folder that holds the installed ``megatron/core``; raises if there is none."""
    try:
        spec = importlib.util.find_spec("megatron.core")
    except (ModuleNotFoundError, ValueError):  # ValueError: a stub without a spec is in its place
        spec = None
    if spec is None or spec.origin is None:
        raise UnsupportedMegatronError("megatron-core is not installed: pip install megatron-core")
    return Path(spec.origin).parents[2]


def dotted(release: tuple[int, ...]) -> str:
    """Write a release as ``"0.19.2"``."""
    return ".".join(map(str, release))


def version(root: Path) -> tuple[int, ...]:
    """Read ``(major, minor, patch)`` from a source tree; raises if it is too old, or none."""
    path = root / "megatron/core/package_info.py"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    numbers = re.findall(r"^(?:MAJOR|MINOR|PATCH)\s*=\s*(\d+)", text, re.M)
    if len(numbers) != 3:
        raise UnsupportedMegatronError(f"no megatron-core at {root}: {path} states no version")
    release = tuple(map(int, numbers))
    if release[:2] < OLDEST:
        old = f"megatron-core {dotted(release)} at {root} is too old"
        raise UnsupportedMegatronError(f"{old}: {dotted(OLDEST)} to {dotted(NEWEST)} are supported")
    return release


def _code(root: Path, site: Site) -> Optional[CodeType]:
    """The code object of a site's method, or None if the tree has no such file or method."""
    path = root / (site.module.replace(".", "/") + ".py")
    if not path.is_file():
        return None
    try:
        code: Optional[CodeType] = compile(path.read_bytes(), path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:  # ValueError: cannot be decoded
        raise UnsupportedMegatronError(f"{path} cannot be read by this Python: {error}") from error
    for name in (site.cls, site.method):
        inner = [c for c in code.co_consts if isinstance(c, CodeType)] if code else []
        code = next((c for c in inner if c.co_name == name), None)
    return code


def _recognize(site: Site, code: CodeType) -> list[Site]:
    """The site as its code has it, or nothing if that does not embed as the table says."""
    site = site._replace(parameters=code.co_varnames[1 : code.co_argcount])
    names = (*code.co_names, *code.co_consts, *site.parameters)
    scatters = "scatter_to_sequence_parallel" in names
    if "scatter_embeddings" in names:  # the function that `diff` adds; with both, half patched
        return [] if scatters else [site._replace(native="this fix")]
    embeds = ("input_ids", "position_ids") in code.co_consts  # the keywords of a call
    if "embedding" not in names or not (embeds or site.role == "hand on"):
        return []
    return [site._replace(native="own scatter" if scatters else "no shard")]
