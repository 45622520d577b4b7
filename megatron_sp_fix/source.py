# SPDX-License-Identifier: Apache-2.0
"""The source form: the fix as a unified diff, or as a series of mails, for a megatron-core tree.

`upstream_tests/` holds what is changed and what is said of it. Here it is found in the user's own
files, by their syntax trees, and replaced there as text: what is not replaced stays as it is, to
the byte.
"""

import ast
import difflib
import email.utils
import functools
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Optional, Union

from .sites import OLDEST, UnsupportedMegatronError, version
from .upstream_tests import core, messages
from .upstream_tests.core import Change, Import

__all__ = ["diff", "mail", "signer"]

_TEXTS = Path(__file__).parent / "upstream_tests"
_Files = dict[str, str]
_Span = tuple[tuple[int, int], tuple[int, int]]


def diff(root: Path) -> str:
    """Make the patch that puts the fix into a source tree. Reads the tree and writes nothing.

    Args:
        root: the folder that holds ``megatron/core``; if it holds ``tests/unit_tests`` too, the
            patch adds tests there.

    Returns:
        str: a unified diff that ``git apply`` and ``patch -p1`` take, relative to `root`; empty if
        the tree has the fix already.

    Raises:
        UnsupportedMegatronError: something is not recognized, or a file cannot be read as Python;
            the message names the file, the method and what was looked for.
    """
    (_, before, _), *_, (_, _, after) = _series(root)
    return _unified(before, after)


def mail(root: Path, sign_off: str) -> str:
    """Make the fix as a series of mails that ``git am`` takes, each a step that stands by itself.

    Args:
        root: as for :func:`diff`.
        sign_off: ``Name <address>``, the author, who signs off.

    Returns:
        str: an mbox; empty if the tree has the fix already.

    Raises:
        UnsupportedMegatronError: as for :func:`diff`.
    """
    steps = [step for step in _series(root) if step[1] != step[2]]
    date = email.utils.formatdate(localtime=True)
    mails = ""
    for number, (name, before, after) in enumerate(steps, 1):
        subject, body = messages.message(name, before)
        mails += (
            f"From {'0' * 40} Mon Sep 17 00:00:00 2001\nFrom: {sign_off}\nDate: {date}\n"
            f"Subject: [PATCH {number}/{len(steps)}] {subject}\nMIME-Version: 1.0\n"
            "Content-Type: text/plain; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n\n"
            f"{body}\nSigned-off-by: {sign_off}\n---\n\n"
            f"{_unified(before, after)}-- \nmegatron-sp-fix\n\n"
        )
    return mails


def signer(root: Path) -> str:
    """Read ``Name <address>`` of git's configured user.

    Args:
        root: the folder whose repository's configuration counts.

    Raises:
        ValueError: git has no name or no address.
    """
    values = []
    for key in ("user.name", "user.email"):
        command = ["git", "config", key]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if not done.stdout.strip():
            raise ValueError(f"git has no {key} to sign off with: set it by `git config {key} ...`")
        values.append(done.stdout.strip())
    return f"{values[0]} <{values[1]}>"


def _series(root: Path) -> list[tuple[str, _Files, _Files]]:
    """Each patch's name, and the files before and after it."""
    release = version(root)
    if release[:2] < OLDEST:
        found, oldest = (".".join(map(str, numbers)) for numbers in (release, OLDEST))
        raise UnsupportedMegatronError(f"megatron-core {found} at {root} is older than {oldest}")
    files = {path: _read(root, path) for path in core.PATHS if (root / path).is_file()}
    groups = core.GROUPS[0] if "tp_group" in files.get(core.EMBEDDING, "") else core.GROUPS[1]
    padded = any("padding_slice" in text for text in files.values())
    steps = []
    for name, changes in (
        ("padding", core.PADDING if padded else ()),
        ("scatter", (groups, *core.SCATTER, *core.TESTS)),
        ("reduce_scatter", core.REDUCE_SCATTER),
    ):
        before, files = files, dict(files)
        for change in changes:
            try:
                _apply(files, change)
            except UnsupportedMegatronError as error:
                raise UnsupportedMegatronError(f"{root}: {error}") from None
        for part in ("ranks", name) if changes and core.EMBEDDING_TESTS in files else ():
            _add_tests(files, part)
        steps.append((name, before, files))
    for path, text in files.items():
        if re.search(core.SCATTERED_AGAIN, text):
            raise UnsupportedMegatronError(
                f"{root / path}: a statement unknown to megatron-core scatters decoder_input"
            )
    return steps


def _read(root: Path, path: str) -> str:
    # Bytes decoded by hand: `open` would turn a file's \r\n into \n, and the diff would not apply.
    try:
        text = (root / path).read_bytes().decode("utf-8")
        _parse(text)
    except UnicodeDecodeError as error:
        raise UnsupportedMegatronError(f"{root / path} is not UTF-8: {error.reason}") from None
    except (SyntaxError, ValueError) as error:
        raise UnsupportedMegatronError(f"{root / path} is not Python: {error}") from None
    return text


@functools.lru_cache(maxsize=64)
def _parse(text: str) -> ast.Module:
    # A byte order mark is a character of the first line, which nothing here changes.
    return ast.parse(text.removeprefix("\ufeff"))


def _apply(files: _Files, change: Union[Change, Import]) -> None:
    """Make a change in the first of its places that there is."""
    for place in change.places.split(" | "):
        path, _, name = place.partition(":")
        scope = _scope(files.get(path), name.strip())
        if scope is not None:
            break
    else:
        if isinstance(change, Change) and change.need == "present":
            return
        raise UnsupportedMegatronError(f"there is no {change.places.replace(' | ', ' or ')}")
    if isinstance(change, Import):
        files[path] = _with_import(files[path], change.module, change.names)
        return
    if _key(change.done) in _key(ast.unparse(scope)):
        return
    spans = _spans(scope, change.find, _lines(files[path]))
    if len(spans) == 1 or (spans and change.find.startswith("every ")):
        new = _variant(files, change.new).replace("{group}", _group(files[path]))
        for span in sorted(spans, reverse=True):
            files[path] = _replaced(files[path], span, new)
    elif change.need != "maybe":
        raise UnsupportedMegatronError(
            f"{place}: looked for one `{change.find}` and found {len(spans) or 'none'}. The source "
            "form fits code as megatron-core has it; `megatron-sp-fix run` needs no known source"
        )


def _scope(text: Optional[str], name: str) -> Optional[ast.AST]:
    """Find ``Class.method``, a class or a function; the whole module for an empty name."""
    node: Optional[ast.AST] = None if text is None else _parse(text)
    for part in name.split(".") if name else ():
        body = getattr(node, "body", ())
        node = next((child for child in body if getattr(child, "name", None) == part), None)
    return node


def _spans(scope: ast.AST, find: str, lines: list[str]) -> set[_Span]:
    """Find where a piece of code stands: from line and column to line and column."""
    key, spans = _key(find.removeprefix("every ")), set()
    for node in ast.walk(scope):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for number in range(node.lineno, (node.end_lineno or 0) + 1):  # a docstring's lines
                text = lines[number - 1].rstrip()
                if _key(text) == key:
                    spans.add(((number, len(text) - len(text.lstrip())), (number, len(text))))
        if _key(_label(node)) == key:
            parts = [p for p in ast.walk(node) if isinstance(p, (ast.stmt, ast.expr, ast.arg))]
            first = min((part.lineno, part.col_offset) for part in parts)
            last = max((part.end_lineno or 0, part.end_col_offset or 0) for part in parts)
            spans.add((_characters(first, lines), _characters(last, lines)))
    return spans


def _label(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef):
        return f"def {node.name}"
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    return f"if {ast.unparse(node.test)}:" if isinstance(node, ast.If) else ast.unparse(node)


def _key(code: str) -> str:
    """What is left of code without what formatters change."""
    return re.sub(r"[\s()\"']", "", code)


def _characters(place: tuple[int, int], lines: list[str]) -> tuple[int, int]:
    # Syntax trees count bytes.
    number, column = place
    return number, len(lines[number - 1].encode()[:column].decode())


def _replaced(text: str, span: _Span, new: str) -> str:
    lines = _lines(text)
    (first, start), (last, stop) = span
    if not new:
        while lines[first - 2].lstrip().startswith("#"):
            first -= 1
        first -= not lines[first - 2].strip()
        return "".join(lines[: first - 1] + lines[last:])
    head, tail = lines[first - 1][:start], lines[last - 1][stop:]
    old = "".join(lines[first - 1 : last])[start : -len(tail) or None]
    indent = head[: len(head) - len(head.lstrip())]
    rows = [indent + row if row else "" for row in new.split("\n")]
    rows[-1] = rows[-1] or indent
    made = "\n".join(rows).replace("    {outdent}", "").removeprefix(indent)
    made = made.replace("\n", _end(lines)).replace("{old}", old)
    return "".join([*lines[: first - 1], head + made + tail, *lines[last:]])


def _with_import(text: str, module: str, names: Sequence[str]) -> str:
    """Import names as isort would: with those of the same module, else among megatron's."""
    lines = _lines(text)
    nodes = [node for node in _parse(text).body if isinstance(node, ast.ImportFrom)]
    same = [node for node in nodes if node.module == module]
    there = [ast.unparse(alias) for node in same for alias in node.names]
    names = [name for name in names if name not in there]
    if not names:
        return text
    if len(same) == 1 and "#" not in "".join(lines[same[0].lineno - 1 : same[0].end_lineno]):
        names = [*there, *names]
        first, last = same[0].lineno, same[0].end_lineno or 0
    else:  # a statement of its own, also where comments stand among the names
        ours = [node for node in nodes if (node.module or "").startswith("megatron.")]
        after = [node for node in ours if (node.module or "") <= module]
        last = (after[-1].end_lineno or 0) if after else ours[0].lineno - 1
        first = last + 1
    names = sorted(names, key=lambda name: (not name[0].isupper(), name))
    row = f"from {module} import {', '.join(names)}"
    if len(row) > 100:
        row = "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])
    row = (row + "\n").replace("\n", _end(lines))
    return "".join([*lines[: first - 1], row, *lines[last:]])


def _add_tests(files: _Files, part: str) -> None:
    source = _variant(files, (_TEXTS / f"{part}.py").read_text(encoding="utf-8"))
    body = _parse(source).body
    imports = [node for node in body if isinstance(node, ast.ImportFrom)]
    definition = next(node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef)))
    text = files[core.EMBEDDING_TESTS]
    if _scope(text, definition.name) is not None:
        return
    for node in imports:
        names = [alias.name for alias in node.names]
        text = _with_import(text, node.module or "", names)
    end = _end(_lines(text))
    code = "".join(_lines(source)[imports[-1].end_lineno or 0 :]).strip() + "\n"
    text += "" if text.endswith("\n") else end
    files[core.EMBEDDING_TESTS] = text + ("\n\n" + code).replace("\n", end)


def _variant(files: _Files, text: str) -> str:
    for path, word, pairs in core.VARIANTS:
        for old, new in pairs if word not in files.get(path, "") else ():
            text = re.sub(old, new, text, flags=re.DOTALL)
    return text


def _group(text: str) -> str:
    """The argument that names a model's own tensor parallel group, where its file has one."""
    for group in ("self.tp_group = ", "self.pg_collection.tp,", "self.model_comm_pgs.tp,"):
        if group in text:
            return f", {group.rstrip(' =,')}"
    return ""


def _lines(text: str) -> list[str]:
    # Not `splitlines`, which also splits at form feeds, where neither `ast` nor git does.
    parts = text.split("\n")
    return [part + "\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def _end(lines: list[str]) -> str:
    return "\r\n" if lines[0].endswith("\r\n") else "\n"


def _unified(before: _Files, after: _Files) -> str:
    text = ""
    for path in sorted(after):
        if before[path] != after[path]:
            rows = difflib.unified_diff(
                _lines(before[path]), _lines(after[path]), f"a/{path}", f"b/{path}"
            )
            text += f"diff --git a/{path} b/{path}\n" + "".join(
                row if row.endswith("\n") else f"{row}\n\\ No newline at end of file\n"
                for row in rows
            )
    return text
