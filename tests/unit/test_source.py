# SPDX-License-Identifier: Apache-2.0
"""The source form, on copies of the installed megatron-core and of other trees that are at hand.

Those are the releases unpacked in `.cache/matrix` and, where MEGATRON_LM names a Megatron-LM
checkout, its main and the first tag of each release.
"""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_sp_fix import UnsupportedMegatronError, sites, source
from megatron_sp_fix.upstream_tests import core

MATRIX = Path(__file__).parents[2] / ".cache/matrix"
CHECKOUT = os.environ.get("MEGATRON_LM", "")
RELEASES = sorted(path.name for path in MATRIX.glob("*") if re.fullmatch(r"[0-9.]+", path.name))
TAGS = ["HEAD", *(f"core_v0.{minor}.0" for minor in range(12, 20))] if CHECKOUT else []
GPT = "megatron/core/models/gpt/gpt_model.py"
MTP = "megatron/core/transformer/multi_token_prediction.py"
VERSION = "megatron/core/package_info.py"
TESTS = """# A tree's own tests.

import pytest
import torch

from megatron.core.transformer.transformer_config import TransformerConfig
from tests.unit_tests.test_utilities import Utils


class TestOfItsOwn:
    pass
"""


def make(name, folder):
    """A git checkout of the files that matter, of the installed package, a release or a tag."""
    tree = folder / "tree"
    for path in [*core.PATHS, VERSION]:
        if name in TAGS:
            command = ["git", "-C", CHECKOUT, "show", f"{name}:{path}"]
            done = subprocess.run(command, capture_output=True, check=False)
            text = done.stdout if done.returncode == 0 else None
        else:
            root = sites.installed_root() if name == "installed" else MATRIX / name
            text = (root / path).read_bytes() if (root / path).is_file() else None
        if text is None and path == core.EMBEDDING_TESTS:
            text = TESTS.encode()
        if text is not None:
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(text)
    git(tree, "init", "-q")
    git(tree, "config", "user.name", "Ä. Person")
    git(tree, "config", "user.email", "a@example.org")
    commit(tree)
    return tree


@pytest.fixture
def tree(tmp_path):
    return make("installed", tmp_path)


def git(tree, *arguments, **options):
    done = subprocess.run(
        ["git", *arguments], cwd=tree, capture_output=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.decode()


def commit(tree):
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "a tree", "--allow-empty")


def contents(tree):
    files = (path for path in tree.rglob("*") if path.is_file() and ".git" not in path.parts)
    return {str(path.relative_to(tree)): path.read_bytes() for path in files}


def check_round_trip(tree):
    """The diff applies, leaves nothing to do, and comes off again to the byte."""
    before = contents(tree)
    patch = source.diff(tree).encode()
    assert contents(tree) == before, "diff wrote into the tree"
    git(tree, "apply", input=patch)
    after = contents(tree)
    assert after.keys() == before.keys()
    for path, text in after.items():
        compile(text, path, "exec")
    assert b"def scatter_embeddings(" in after[core.EMBEDDING]
    assert b"class TestTowerReduceScatters" in after[core.EMBEDDING_TESTS]
    padded = b"padding_slice" in before[GPT]
    assert (b"class TestPaddingRows" in after[core.EMBEDDING_TESTS]) is padded
    for match in sites.supported(tree)[0]:
        assert match.native == "this fix", match.name
    assert source.diff(tree) == "" and source.mail(tree, "A <a@example.org>") == ""
    git(tree, "apply", "-R", input=patch)
    assert contents(tree) == before
    return patch


@pytest.mark.parametrize("name", ["installed", *RELEASES, *TAGS])
def test_the_diff_applies_and_comes_off_to_the_byte(name, tmp_path):
    check_round_trip(make(name, tmp_path))


@pytest.mark.parametrize("name", ["installed", *TAGS])
def test_the_mails_are_steps_to_the_same_tree(name, tmp_path):
    tree = make(name, tmp_path)
    patch = source.diff(tree)
    box = source.mail(tree, source.signer(tree))
    padded = "_zero_padding_rows" in patch
    numbers = re.findall(r"^Subject: \[PATCH (\d)/(\d)\]", box, re.M)
    assert numbers == ([("1", "3"), ("2", "3"), ("3", "3")] if padded else [("1", "2"), ("2", "2")])
    git(tree, "am", "-q", input=box.encode())
    by_mail = contents(tree)
    for line in git(tree, "log", f"-{len(numbers)}", "--format=%an <%ae>%n%b").splitlines():
        assert len(line) <= 80
    assert "Ä. Person <a@example.org>" in git(tree, "log", "-1", "--format=%an <%ae>")
    assert "Signed-off-by: Ä. Person <a@example.org>" in git(tree, "log", "-1", "--format=%b")
    git(tree, "reset", "-q", "--hard", f"HEAD~{len(numbers)}")
    git(tree, "apply", input=patch.encode())
    assert contents(tree) == by_mail


def test_without_tests_in_the_tree(tree):
    shutil.rmtree(tree / "tests")
    commit(tree)
    box = source.mail(tree, "A <a@example.org>")
    assert "test" not in box.lower()
    git(tree, "apply", input=source.diff(tree).encode())
    assert source.diff(tree) == ""


def test_the_mail_says_what_is_true_of_the_tree(tree):
    native = "not self.embedding.scatter_to_sequence_parallel" in (tree / GPT).read_text()
    box = source.mail(tree, "A <a@example.org>")
    assert ("scatter by themselves" in box) is native
    assert ("run on all rows on every rank" in box) is not native


def test_no_name_to_sign_with(tree, monkeypatch):
    git(tree, "config", "--unset", "user.email")
    for scope in ("GLOBAL", "SYSTEM"):
        monkeypatch.setenv(f"GIT_CONFIG_{scope}", os.devnull)
    with pytest.raises(ValueError, match=r"git has no user\.email"):
        source.signer(tree)


@pytest.mark.parametrize("form", ["crlf", "bom", "no newline at the end", "comments"])
def test_files_keep_their_form(tree, form):
    for path in core.PATHS:
        if (tree / path).is_file():
            text = (tree / path).read_bytes()
            if form == "crlf":
                text = text.replace(b"\n", b"\r\n")
            elif form == "bom":
                text = b"\xef\xbb\xbf" + text
            elif form == "no newline at the end":
                text = text.rstrip(b"\n")
            else:
                text = re.sub(rb"(?m)^(from .*)$", rb"\1  # imported", text)
                text = re.sub(rb"(?m)^(    +decoder_input = .*\))$", rb"\1  # a fork's", text)
                text = text.replace(
                    b"(input_ids=input_ids, position", b"(\n input_ids=input_ids,position"
                )
            (tree / path).write_bytes(text)
    git(tree, "config", "core.autocrlf", "false")
    commit(tree)
    patch = check_round_trip(tree)
    if form == "comments":
        assert not re.search(rb"(?m)^-.*# imported", patch)
    if form == "crlf":
        added = [line for line in patch.split(b"\n") if line.startswith((b"+", b"-"))]
        assert all(line.endswith(b"\r") for line in added if line[:3] not in (b"+++", b"---"))


def test_a_half_patched_tree_is_completed(tree):
    before = contents(tree)
    git(tree, "apply", input=source.diff(tree).encode())
    (tree / GPT).write_bytes(before[GPT])
    patch = source.diff(tree)
    assert re.findall(r"^\+\+\+ b/(.*)$", patch, re.M) == [GPT]
    git(tree, "apply", input=patch.encode())
    assert source.diff(tree) == ""


@pytest.mark.parametrize(
    "path, old, new, message",
    [
        (MTP, "decoder_input = embedding(", "x = embedding(", r"_get_embeddings: looked for one"),
        (GPT, "class GPTModel(", "class GPT(", r"there is no .*gpt_model\.py: GPTModel"),
        (GPT, "class GPTModel(", "class GPTModel((", r"gpt_model\.py is not Python"),
        (GPT, "class GPTModel(", "class Ä(", r"gpt_model\.py is not Python: 'utf-8'"),
        (core.EMBEDDING, "if not self.reduce_", "if not self.reduce", r"LanguageModelEmb.*forward"),
        (VERSION, "MINOR = 1", "MINOR = 0", r"is too old: 0\.12"),
    ],
)
def test_what_is_not_recognized_gives_one_line_and_no_diff(tree, path, old, new, message):
    text = (tree / path).read_text()
    assert old in text
    encoding = "utf-8" if new.isascii() else "latin-1"
    (tree / path).write_bytes(text.replace(old, new).encode(encoding, "replace"))
    with pytest.raises(UnsupportedMegatronError, match=message) as error:
        source.diff(tree)
    assert str(tree) in str(error.value) and "\n" not in str(error.value)


def test_a_scatter_of_a_forks_own_is_not_left_to_scatter_twice(tree):
    text = (tree / GPT).read_text()
    call = "decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)\n"
    again = "if True:\n    decoder_input = scatter_to_sequence_parallel_region(decoder_input)\n"
    text = text.replace(call, call + textwrap.indent(again, " " * 12))
    (tree / GPT).write_text(text)
    with pytest.raises(UnsupportedMegatronError, match=r"gpt_model\.py: .* scatters decoder_input"):
        source.diff(tree)


def test_no_tree_there(tmp_path):
    with pytest.raises(UnsupportedMegatronError, match="no megatron-core"):
        source.diff(tmp_path)


def test_the_patched_package_computes_its_embeddings_by_the_function(tmp_path):
    """A whole patched copy imports, first in the path of a process of its own."""
    root = sites.installed_root()
    shutil.copytree(root / "megatron", tmp_path / "megatron")
    git(tmp_path, "apply", input=source.diff(tmp_path).encode())
    code = (
        "from megatron.core.models.gpt import gpt_model\n"
        "from megatron.core.transformer import multi_token_prediction as mtp\n"
        "assert gpt_model.scatter_embeddings is mtp.scatter_embeddings\n"
        f"assert gpt_model.__file__.startswith({str(tmp_path)!r})"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)
