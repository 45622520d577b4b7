# SPDX-License-Identifier: Apache-2.0
"""The table of call sites as a unified diff of any megatron-core source tree."""

import ast
import difflib
import email.utils
import subprocess
from pathlib import Path
from typing import Optional

from .sites import Found, find, version

__all__ = ["diff", "mail"]

_HERE = Path(__file__).parent
_FIX = "megatron/core/models/common/embeddings/embedding.py"
_TEST = "tests/unit_tests/models/test_standalone_tower.py"
# Upstream's own test of #6256 mocks the statement that this patch replaces; ours covers it.
_MOCKED = "tests/unit_tests/transformer/test_multi_token_prediction.py"
_MOCKING = "test_get_embeddings_scatters_when_embedding_does_not"
_WIDTH = 100

_SUBJECT = "Shard a standalone language tower's embeddings by a reduce-scatter"
_BODY = """\
A model built with scatter_embedding_sequence_parallel=False returns full-length
embeddings, because a multimodal outer model shards them. When it embeds its own
tokens under sequence parallelism (distillation, quantization, text-only
training), its decoder must get a shard.

megatron-core scatters at some of these places by itself, after an all-reduce.
That leaves:
- the full-length tensor alive until backward, since the scattered part is a view
- an all-reduce of [s, b, h] where a plain LM (unless it adds learned positions)
  pays one reduce-scatter
- an embedding that shards by itself (a wrapper) sharded twice, and one without the
  flag (a function) refused
- MTP's speculative step without a shard
- no regression test on ranks

models/common/embeddings/embedding.py embeds as a plain LM would, and every place
that embeds tokens for a decoder calls it. The embedding module is not changed,
so an outer model still gets full length. In a standalone forward, hooks on the
embedding and on its word embeddings see what they see in a plain LM: the shard.
Padding masks are sharded where tokens are embedded, over the model's own TP group.

Tested: logits, loss and all gradients are bitwise those of a model built with
the flag on, for GPTModel and HybridModel, at TP 2 and 4, and for MTP on 0.12 to
0.19. The new unit test fails without the change at any of the call sites.

At tp=2, h=4096, bf16, s=131072 the input step of a plain LM keeps 513 MiB for
backward, all-reduce and split 1025 MiB; this change keeps what the plain LM
keeps, and sends forward what it sends, half of an all-reduce. On two H100s over
NVLink, with a vocabulary of 152064, that step's forward takes 4.05 ms with this
change, 5.27 with all-reduce and split, and 4.40 in a plain LM, which also copies
the shard; with the backward 12.2, 13.5 and 12.6. A whole training step takes the
same time in all three.
"""


def diff(root: Path) -> str:
    """Make the patch that puts the fix into a source tree. Reads the tree and writes nothing.

    Args:
        root: the folder that holds ``megatron/core``; if it holds ``tests/unit_tests`` too, the
            patch adds a regression test.

    Returns:
        str: a unified diff that ``git apply`` and ``patch -p1`` take, relative to `root`; empty if
        the tree carries the fix already.

    Raises:
        UnsupportedMegatronError: a call site is not recognized; the message names file and method.
    """
    version(root)
    found = find(root)
    changes: dict[str, tuple[Optional[str], str]] = {}
    _add(changes, root, _FIX, (_HERE / "embedding.py").read_text(encoding="utf-8"))
    for path in dict.fromkeys(match.site.path for match in found):
        before = _read(root / path)
        matches = [m for m in found if m.site.path == path and m.form != "source"]
        if matches:
            changes[path] = (before, _patched(before, matches))
    if (root / "tests/unit_tests").is_dir():
        _add(changes, root, _TEST, (_HERE / "regression_test.py").read_text(encoding="utf-8"))
        if (root / _MOCKED).is_file():
            _add(changes, root, _MOCKED, _without(_read(root / _MOCKED), _MOCKING))
    return "".join(_unified(path, *changes[path]) for path in sorted(changes))


def mail(root: Path) -> str:
    """Make the patch as a mail that ``git am`` takes, signed off by git's configured user.

    Args:
        root: as for :func:`diff`.

    Returns:
        str: the mail; empty if the tree carries the fix already.

    Raises:
        UnsupportedMegatronError: as for :func:`diff`.
        ValueError: git is not configured with a name and a mail address.
    """
    patch = diff(root)
    if not patch:
        return ""
    name, address = _configured(root, "user.name"), _configured(root, "user.email")
    return (
        f"From {'0' * 40} Mon Sep 17 00:00:00 2001\n"
        f"From: {email.utils.formataddr((name, address))}\n"
        f"Date: {email.utils.formatdate(localtime=True)}\nSubject: [PATCH] {_SUBJECT}\n\n"
        f"{_BODY}\nSigned-off-by: {name} <{address}>\n---\n\n{patch}-- \nmegatron-sp-fix\n"
    )


def _configured(root: Path, name: str) -> str:
    done = subprocess.run(
        ["git", "config", name], cwd=root, capture_output=True, text=True, check=False
    )
    value = done.stdout.strip()
    if not value:
        raise ValueError(f"git has no {name} to sign off with: set it by `git config {name} ...`")
    return value


def _read(path: Path) -> str:
    # Bytes decoded by hand: `open` would turn a file's \r\n into \n, and the diff would not apply.
    return path.read_bytes().decode("utf-8")


def _add(
    changes: dict[str, tuple[Optional[str], str]], root: Path, path: str, content: str
) -> None:
    before = _read(root / path) if (root / path).is_file() else None
    if before != content:
        changes[path] = (before, content)


def _patched(text: str, matches: list[Found]) -> str:
    """Replace the statements at a file's call sites, from the last to the first."""
    end = "\r\n" if "\r\n" in text else "\n"
    lines = _lines(text)
    edits: list[tuple[int, int, list[str]]] = []
    names = set()
    for match in matches:
        indent = " " * match.call.col_offset
        masked = f"{indent}    padding_mask = shard_padding_mask(self, padding_mask, input_ids)"
        if match.site.embeds == "embedding":
            names.add("sharding_embedding")
            arguments = ast.unparse(match.call.value).partition("(")[2][:-1]
            new = _call(f"{indent}decoder_input = sharding_embedding(self, embedding)", arguments)
        else:
            names.add("embed_for_decoder")
            arguments = "self, input_ids, position_ids, inference_context"
            new = _call(f"{indent}decoder_input = embed_for_decoder", arguments)
            if match.takes_mask:
                names.add("shard_padding_mask")
                if match.mask is None:
                    new += [
                        f"{indent}if padding_mask is not None and self.config.sequence_parallel:",
                        masked,
                    ]
        edits.append((match.call.lineno, match.call.end_lineno or 0, new))
        if match.mask is not None:
            edits.append((match.mask.lineno, match.mask.end_lineno or 0, [masked]))
        if match.scatter is not None:
            first = match.scatter.lineno
            while lines[first - 2].lstrip().startswith("#"):
                first -= 1
            first -= not lines[first - 2].strip()
            edits.append((first, match.scatter.end_lineno or 0, []))
    module = _FIX.removesuffix(".py").replace("/", ".")
    edits.append(_import(ast.parse(text), module, sorted(names)))
    for first, last, new in sorted(edits, reverse=True):
        lines[first - 1 : last] = [line + end for line in new]
    return "".join(lines)


def _without(text: str, name: str) -> str:
    """Remove a test, its decorators and the blank line after it."""
    lines = _lines(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            last = node.end_lineno or first
            if last < len(lines) and not lines[last].strip():
                last += 1
            del lines[first - 1 : last]
            break
    return "".join(lines)


def _call(function: str, arguments: str) -> list[str]:
    """Write a call as black would: on one line, or with its arguments on the next."""
    line = f"{function}({arguments})"
    if len(line) <= _WIDTH:
        return [line]
    indent = " " * (len(function) - len(function.lstrip()))
    return [f"{function}(", f"{indent}    {arguments}", f"{indent})"]


def _import(tree: ast.Module, module: str, names: list[str]) -> tuple[int, int, list[str]]:
    """Place the import as isort would: among megatron's, by module name."""
    ours = [
        node
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.")
    ]
    after = [node for node in ours if (node.module or "") < module and not node.level]
    line = after[-1].end_lineno or 0 if after else ours[0].lineno - 1
    new = f"from {module} import {', '.join(names)}"
    if len(new) > _WIDTH:
        return line + 1, line, [f"from {module} import (", *(f"    {n}," for n in names), ")"]
    return line + 1, line, [new]


def _lines(text: str) -> list[str]:
    # Not `splitlines`, which also splits at form feeds, where neither `ast` nor git does.
    parts = text.split("\n")
    return [part + "\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def _unified(path: str, before: Optional[str], after: str) -> str:
    head = f"diff --git a/{path} b/{path}\n"
    if before is None:
        head += "new file mode 100644\n"
    old = "/dev/null" if before is None else f"a/{path}"
    lines = difflib.unified_diff(_lines(before or ""), _lines(after), old, f"b/{path}")
    return head + "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )
