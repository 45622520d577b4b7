# SPDX-License-Identifier: Apache-2.0
"""The source form: the fix as a unified diff, or as a series of mails, for a megatron-core tree.

`upstream_tests/` holds what is changed and what is said of it. Here it is found in the user's own
files, by their syntax trees, and replaced there as text; the rest stays as it is, to the byte.
"""

import ast
import difflib
import functools
import io
import re
import subprocess
from email.utils import formatdate
from pathlib import Path
from typing import Optional, Union

from .sites import UnsupportedMegatronError, version
from .upstream_tests import core, messages


def diff(root: Path) -> str:
    """Make the patch of a tree: a unified diff relative to `root`, empty if it has the fix already.

    It adds tests where the tree has ``tests/unit_tests``. Nothing is written.

    Raises:
        UnsupportedMegatronError: a file is not Python, or lacks code that the message names.
    """
    before, *_, after = _series(root)
    return _unified(before, after)


def mail(root: Path, sign_off: str) -> str:
    """Make the same as an mbox that ``git am`` takes, by an author who signs off: three steps."""
    states = _series(root)
    steps = [step for step in zip(core.PATCHES, states, states[1:]) if step[1] != step[2]]
    mails = ""
    for number, (name, before, after) in enumerate(steps, 1):
        subject, body = messages.message(name, before)
        mails += (
            f"From {'0' * 40} Mon Sep 17 00:00:00 2001\nFrom: {sign_off}\nDate: "
            f"{formatdate(localtime=True)}\nSubject: [PATCH {number}/{len(steps)}] {subject}\n"
            "MIME-Version: 1.0\nContent-Type: text/plain; charset=UTF-8\n"
            f"Content-Transfer-Encoding: 8bit\n\n{body}\nSigned-off-by: {sign_off}\n---\n\n"
            f"{_unified(before, after)}-- \nmegatron-sp-fix\n\n"
        )
    return mails


def signer(root: Path) -> str:
    """Read ``Name <address>`` from git's configuration in a folder; a ValueError if it has none."""
    # With `useConfigOnly`, git does not make up an address from the names of user and machine.
    command = ["git", "-c", "user.useConfigOnly=true", "var", "GIT_AUTHOR_IDENT"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError("git has no user.email or user.name to sign off with: see `git config`")
    return done.stdout.rsplit(" ", 2)[0]  # without the time and its zone


def _series(root: Path) -> list[dict[str, str]]:
    """The files as they are, and after each of the patches."""
    version(root)  # raises if it is too old
    files = {path: _read(root / path) for path in core.PATHS if (root / path).is_file()}
    states = [files]
    for name, changes in core.PATCHES.items():
        files = dict(files)
        if name != "padding" or any("padding_slice" in text for text in files.values()):
            for change in (*changes, *_tests("ranks"), *_tests(name)):
                _apply(root, files, change)
        states.append(files)
    for path, text in files.items():
        if re.search(core.SCATTERED_AGAIN, text):
            raise UnsupportedMegatronError(f"{root / path}: unknown code scatters decoder_input")
    return states


def _read(path: Path) -> str:
    # Bytes decoded by hand: `open` would turn a file's \r\n into \n, and the diff would not apply.
    try:
        text = path.read_bytes().decode("utf-8")
        _parse(text)
    except (SyntaxError, ValueError) as error:  # ValueError: cannot be decoded
        raise UnsupportedMegatronError(f"{path} is not Python: {error}") from None
    return text


@functools.lru_cache(maxsize=64)
def _parse(text: str) -> ast.Module:
    return ast.parse(text.removeprefix("\ufeff"))  # which a string must not begin with


def _tests(part: str) -> tuple[core.Import, core.Change]:
    """The changes that add a file of tests to the end of the tree's own."""
    text = (Path(__file__).parent / f"upstream_tests/{part}.py").read_text(encoding="utf-8")
    imports, code = text.rstrip().split("\n\n\n", 1)
    name = re.split("[(=]", code)[0]  # of the class, function or constants that come first
    added = core.Change(f"{core.EMBEDDING_TESTS}:", "all", "{old}\n\n\n" + code, name, "present")
    return core.Import(f"{core.EMBEDDING_TESTS}:", imports, "present"), added


def _apply(root: Path, files: dict[str, str], change: Union[core.Change, core.Import]) -> None:
    """Make a change in the first of its places that there is."""
    for place in change.places.split(" or "):
        path, _, name = place.partition(":")
        if path in files and (scope := _scope(files[path], name)):
            break
    else:
        if change.need == "present":
            return
        raise UnsupportedMegatronError(f"{root}: there is no {change.places}")
    code = change.new  # written for the newest release; an older one's files lack some words
    for lacking, word, pairs in core.VARIANTS:
        for old, new in pairs if word not in files.get(lacking or path, "") else ():
            code = re.sub(old, new, code, flags=re.DOTALL)
    if isinstance(change, core.Import):
        files[path] = _with_imports(files[path], code)
    elif _key(change.done) not in _key(ast.unparse(scope)):
        spans = _spans(scope, change.find, files[path])
        if len(spans) == 1 or (spans and change.need == "every"):
            for span in sorted(spans, reverse=True):
                files[path] = _replaced(files[path], span, code)
        elif change.need != "maybe":
            raise UnsupportedMegatronError(
                f"{root}: {place}: looked for one `{change.find}` and found "
                f"{len(spans) or 'none'}. The source form fits code as megatron-core has it; "
                "`megatron-sp-fix run` needs no known source"
            )


def _scope(text: str, name: str) -> Optional[ast.AST]:
    """Find ``Class.method``, a class or a function; the whole module for an empty name."""
    node: Optional[ast.AST] = _parse(text)
    for part in re.findall(r"\w+", name):
        body = getattr(node, "body", ())
        node = next((child for child in body if getattr(child, "name", None) == part), None)
    return node


def _spans(scope: ast.AST, find: str, text: str) -> set[tuple[int, int]]:
    """Find where a piece of code stands in the text, or else whole lines of a docstring."""
    if find == "all":
        return {_span(scope, text)}
    nodes = [node for node in ast.walk(scope) if _key(_label(node)) == _key(find)]
    words = r"\s+".join(map(re.escape, find.split()))
    lines = re.compile(rf"^[ \t]*({words})\r?$", re.M).finditer(text, *_span(scope, text))
    return {_span(node, text) for node in nodes} or {line.span(1) for line in lines}


def _label(node: ast.AST) -> str:
    """The first line of a node's code; ``class name`` or ``def name`` of a definition."""
    return re.sub(r"^(?:@.*\n)*(class \w+|def \w+|.*)(?s:.*)", r"\1", ast.unparse(node))


def _key(code: str) -> str:
    """What is left of code without what formatters change."""
    return re.sub(r"[\s()\"']", "", code)


def _span(node: ast.AST, text: str) -> tuple[int, int]:
    # A parameter list has no place of its own, but its parts have.
    parts = [part for part in ast.walk(node) if isinstance(part, (ast.stmt, ast.expr, ast.arg))]
    first = min((part.lineno, part.col_offset) for part in parts)
    last = max((part.end_lineno or 0, part.end_col_offset or 0) for part in parts)
    return _offset(text, *first), _offset(text, *last)


def _offset(text: str, line: int, column: int = 0) -> int:
    # Syntax trees count bytes.
    lines = text.encode().split(b"\n")
    return len(b"\n".join([*lines[: line - 1], lines[line - 1][:column]]).decode())


def _replaced(text: str, span: tuple[int, int], new: str) -> str:
    """Put code in a place, indented as it is; where there is none, the statement's lines go."""
    start, stop = span
    if not new:  # with the comment above, and the blank line above that
        above = r"(^[ \t\r]*\n)?(^[ \t]*#.*\n)*^[ \t]*\Z"
        return re.sub(above, "", text[:start], flags=re.M) + text[stop:].partition("\n")[2]
    row = text[:start].rpartition("\n")[2]
    indent = row[: len(row) - len(row.lstrip())]
    end = "\r\n" if text.partition("\n")[0].endswith("\r") else "\n"
    new = re.sub(r"\n(?!\n)", "\n" + indent, new).replace("\n", end)
    return text[:start] + new.replace("{old}", text[start:stop]) + text[stop:]


def _with_imports(text: str, statements: str) -> str:
    """Import names as isort would: with those of the same module, else among megatron's."""
    for new in _imports(statements):
        nodes, lines = _imports(text), text.split("\n")
        same = [node for node in nodes if node.module == new.module]
        there = {ast.unparse(alias) for node in same for alias in node.names}
        names = {alias.name for alias in new.names} - there
        if not names:
            continue
        if len(same) == 1 and "#" not in "".join(lines[same[0].lineno - 1 : same[0].end_lineno]):
            first, after = same[0].lineno, (same[0].end_lineno or 0) + 1
            names |= there
        else:  # a statement of its own, also where comments stand among the names
            ours = [node for node in nodes if str(node.module).startswith("megatron.")]
            before = [node.end_lineno or 0 for node in ours if str(node.module) <= str(new.module)]
            first = after = max(before, default=ours[0].lineno - 1) + 1
        joined = ", ".join(sorted(names))
        row = f"from {new.module} import {joined}"
        if len(row) > 100:
            row = f"from {new.module} import (\n    {joined},\n)".replace(", ", ",\n    ")
        text = _replaced(text, (_offset(text, first), _offset(text, after)), row + "\n")
    return text


def _imports(text: str) -> list[ast.ImportFrom]:
    return [node for node in _parse(text).body if isinstance(node, ast.ImportFrom)]


def _unified(before: dict[str, str], after: dict[str, str]) -> str:
    """The difference as git shows it."""
    text = ""
    for path in sorted(after):
        # Not `splitlines`, which also splits at form feeds, where neither `ast` nor git does.
        old, new = (io.StringIO(files[path]).readlines() for files in (before, after))
        rows = list(difflib.unified_diff(old, new, f"a/{path}", f"b/{path}"))
        text += f"diff --git a/{path} b/{path}\n" if rows else ""
        for row in rows:
            text += row if row.endswith("\n") else f"{row}\n\\ No newline at end of file\n"
    return text
