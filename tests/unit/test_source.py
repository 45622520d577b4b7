# SPDX-License-Identifier: Apache-2.0
"""The source form, on copies of the installed megatron-core."""

import os
import shutil
import subprocess
import sys

import pytest

from megatron_sp_fix import UnsupportedMegatronError, cli, sites, source


@pytest.fixture
def tree(tmp_path):
    """A git checkout of the files that the diff touches, and of the tests' folder."""
    installed, copy = sites.installed_root(), tmp_path / "tree"
    for path in {site.path for site in sites.SITES} | {"megatron/core/package_info.py"}:
        if (installed / path).is_file():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(installed / path, copy / path)
    (copy / "tests/unit_tests").mkdir(parents=True)
    git(copy, "init", "-q")
    git(copy, "config", "user.name", "A. Person")
    git(copy, "config", "user.email", "a@example.org")
    commit(copy)
    return copy


def git(tree, *arguments, **options):
    done = subprocess.run(
        ["git", *arguments], cwd=tree, capture_output=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def commit(tree):
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "a tree", "--allow-empty")


def contents(tree):
    files = (path for path in tree.rglob("*") if path.is_file() and ".git" not in path.parts)
    return {str(path.relative_to(tree)): path.read_bytes() for path in files}


def apply_by(tool, tree, text):
    command = {"git": ["git", "apply"], "patch": ["patch", "-p1", "-s"], "am": ["git", "am", "-q"]}
    done = subprocess.run(
        command[tool], cwd=tree, input=text.encode(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def check_applied(before, tree):
    after = contents(tree)
    fix = "megatron/core/models/common/embeddings/embedding.py"
    test = "tests/unit_tests/models/test_standalone_tower.py"
    assert after.keys() - before.keys() == {fix, test}
    assert b"def embed_for_decoder" in after[fix]
    assert {match.form for match in sites.find(tree)} == {"source"}
    for name in after:
        compile(after[name], name, "exec")
    assert source.diff(tree) == ""


@pytest.mark.parametrize("tool", ["git", "patch"])
def test_it_applies_and_comes_off_to_the_byte(tree, tool):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    before = contents(tree)
    text = source.diff(tree)
    assert contents(tree) == before, "diff wrote into the tree"
    apply_by(tool, tree, text)
    check_applied(before, tree)
    git(tree, "apply", "-R", input=text.encode())
    assert contents(tree) == before


def test_mail_is_for_git_am(tree):
    before = contents(tree)
    apply_by("am", tree, source.mail(tree))
    check_applied(before, tree)
    message = git(tree, "log", "-1", "--format=%an <%ae>%n%s%n%b")
    assert message.startswith("A. Person <a@example.org>\nShard a standalone")
    assert "Signed-off-by: A. Person <a@example.org>" in message
    assert source.mail(tree) == ""


def test_mail_without_a_name(tree, monkeypatch, capsys):
    git(tree, "config", "--unset", "user.email")
    for scope in ("GLOBAL", "SYSTEM"):
        monkeypatch.setenv(f"GIT_CONFIG_{scope}", os.devnull)
    assert cli.main(["diff", "--root", str(tree), "--format", "mail"]) == 2
    captured = capsys.readouterr()
    assert "git has no user.email" in captured.err and not captured.out


@pytest.mark.parametrize("ending", [b"\r\n", b"no newline at the end"])
def test_a_file_keeps_its_line_ends(tree, ending):
    path = tree / "megatron/core/models/gpt/gpt_model.py"
    text = path.read_bytes()
    path.write_bytes(
        text.replace(b"\n", b"\r\n") if ending == b"\r\n" else text.rstrip(b"\n") + b"  # last"
    )
    commit(tree)
    before = contents(tree)
    patch = source.diff(tree)
    git(tree, "apply", input=patch.encode())
    check_applied(before, tree)
    if ending == b"\r\n":
        assert path.read_bytes().count(b"\n") == path.read_bytes().count(b"\r\n")
    git(tree, "apply", "-R", input=patch.encode())
    assert contents(tree) == before


def test_a_half_patched_tree_is_completed(tree):
    before = contents(tree)
    git(tree, "apply", input=source.diff(tree).encode())
    path = "megatron/core/models/gpt/gpt_model.py"
    (tree / path).write_bytes(before[path])
    assert f"b/{path}" in source.diff(tree) and "common/embeddings" not in source.diff(tree)[:200]
    git(tree, "apply", input=source.diff(tree).encode())
    check_applied(before, tree)


def test_an_unrecognized_site_gives_no_partial_diff(tree, capsys):
    path = tree / "megatron/core/transformer/multi_token_prediction.py"
    path.write_text(path.read_text().replace("decoder_input = embedding(", "x = embedding("))
    with pytest.raises(UnsupportedMegatronError, match=r"multi_token_prediction\.py: \w+\.\w+"):
        source.diff(tree)
    assert cli.main(["diff", "--root", str(tree)]) == 1
    captured = capsys.readouterr()
    assert not captured.out and captured.err.count("\n") == 1


def test_no_tree_there(tmp_path, capsys):
    assert cli.main(["diff", "--root", str(tmp_path)]) == 1
    assert f"no megatron-core source tree at {tmp_path}" in capsys.readouterr().err


def test_command_prints_the_installed_packages_diff(tree):
    command = [sys.executable, "-m", "megatron_sp_fix", "diff"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout.startswith(b"diff --git a/megatron/core/") and not done.stderr
    git(tree, "apply", "--check", input=done.stdout)
    git(tree, "apply", input=source.diff(tree).encode())
    done = subprocess.run([*command, "--root", tree], capture_output=True, check=True)
    assert done.stdout == b"" and b"carries the fix already" in done.stderr


def test_the_runtime_patch_steps_aside(tmp_path):
    """On a whole patched copy, first in the path of a process of its own."""
    copy = tmp_path / "patched"
    shutil.copytree(sites.installed_root() / "megatron/core", copy / "megatron/core")
    git(copy, "init", "-q")
    git(copy, "apply", input=source.diff(copy).encode())
    code = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "import megatron_sp_fix as m; print(m.apply(), m.remove())\n"
        "from megatron.core.models.gpt import GPTModel\n"
        "print({(s.native, s.patched, s.by) for s in m.status().sites})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(copy)},
        check=True,
    )
    assert done.stdout.splitlines() == ["() ()", "{('source', True, ())}"]
    assert "is patched in its source" in done.stderr
