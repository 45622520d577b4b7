# SPDX-License-Identifier: Apache-2.0
"""The commands, and their errors: one line each."""

import json
import subprocess
import sys

import pytest

import megatron_sp_fix
from megatron_sp_fix import cli, hook, sites


def run(capsys, *command):
    try:
        code = cli.main(command)
    except SystemExit as stop:
        code = stop.code
    out, error = capsys.readouterr()
    return code, out, error


def test_bare_it_lists_the_commands(capsys):
    code, out, error = run(capsys)
    assert (code, error) == (0, "") and all(f"\n    {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS)])
def test_help_gives_an_example_and_fits(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert "example: megatron-sp-fix" in out or not command


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["demo", "--tp", "x"], "invalid int value: 'x'"),
        (["demo", "--tp", "1"], "--tp 1 does not fit"),
        (["audit", "my_job"], "my_job is not MODULE:FACTORY"),
        (["run"], "name a command"),
    ],
)
def test_usage_errors(capsys, command, message):
    code, out, error = run(capsys, *command)
    assert (code, out, error.count("\n")) == (2, "", 1) and message in error and "--help" in error


@pytest.fixture
def hooked():
    before = list(sys.meta_path)
    hook.install()
    yield
    sys.meta_path[:] = before


def test_status(capsys):
    code, out, _ = run(capsys, "status")
    found = megatron_sp_fix.status()
    assert code == 0 and out.startswith(f"megatron-core {found.version} at {found.root}\n")
    code, out, _ = run(capsys, "status", "--json")
    data = json.loads(out)
    assert (data["version"], data["root"], data["hook"]) == (found.version, found.root, False)
    assert [tuple(site.values()) for site in data["sites"]] == list(found.sites)


def test_status_check(capsys, monkeypatch, hooked):
    row = megatron_sp_fix.SiteStatus("GPTModel.forward", "own scatter", "not imported", "")
    found = megatron_sp_fix.status()

    def check(state):
        rows = (row._replace(state=state),)
        monkeypatch.setattr(cli, "status", lambda root: found._replace(sites=rows))
        return run(capsys, "status", "--check")

    for state in ("not imported", "patched", "this fix"):
        assert check(state)[0] == 0
    for state in ("not patched", "cannot tell"):
        code, _, error = check(state)
        assert code == 1 and "GPTModel.forward" in error and "`megatron-sp-fix run`" in error
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, hook.Finder)]
    assert check("patched")[0] == 0 and check("not imported")[0] == 1
    for name, value in (("MEGATRON_SP_FIX", "of"), ("MEGATRON_SP_FIX_ALSO", "__main__:Model")):
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            hook.install()
        assert check("not imported")[0] == 1


def test_status_of_another_tree(capsys, tmp_path, monkeypatch, hooked):
    root = sites.installed_root()
    code, out, error = run(capsys, "status", "--root", str(root), "--check")
    assert code == 1 and "import hook: none" in out and "by `diff`" in error
    code, out, error = run(capsys, "status", "--root", str(tmp_path))
    assert (code, out) == (1, "") and f"no megatron-core at {tmp_path}" in error
    (tmp_path / "megatron").symlink_to(root / "megatron")
    monkeypatch.setattr(sites, "NEWEST", (0, 11))
    code, out, _ = run(capsys, "status", "--root", str(tmp_path))
    assert code == 0 and "is newer than 0.11" in out.splitlines()[0]
    monkeypatch.setattr(sites, "OLDEST", (99, 0))  # as if the tree had changed
    code, out, error = run(capsys, "status", "--root", str(tmp_path))
    assert (code, out, error.count("\n")) == (1, "", 1) and "is too old: 99.0" in error


JOB = """
import torch
def nothing():
    return 3
def no_language_model():
    return torch.nn.Linear(1, 1)
def broken():
    raise KeyError("what was looked for\\nand more")
def interrupted():
    raise KeyboardInterrupt
def tower():
    import builtins
    return builtins.model
"""


@pytest.fixture
def job(tmp_path, monkeypatch, capsys):
    megatron_sp_fix.apply()
    capsys.readouterr()  # what torch writes when it is imported
    (tmp_path / "somebodys.py").write_text(JOB)
    (tmp_path / "half.py").write_text("import torch\nimport not_there\n")
    (tmp_path / "bad.py").write_text("x = 1\ny = = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    megatron_sp_fix.remove()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("somebodys:nothing", "somebodys:nothing: TypeError: "),
        ("somebodys:no_language_model", "no language model of megatron-core"),
        ("somebodys:broken", "somebodys.py:8: KeyError: 'what was looked for"),
        ("somebodys:missing", "AttributeError: module 'somebodys' has no attribute 'missing'"),
        ("half:x", "half.py:2: ModuleNotFoundError: No module named 'not_there'"),
        ("bad:x", "SyntaxError: invalid syntax (bad.py, line 2)"),
        ("absent:x", "ModuleNotFoundError: No module named 'absent'"),
    ],
)
def test_audit_of_what_cannot_be_audited(capsys, job, factory, message):
    code, out, error = run(capsys, "audit", factory)
    assert (code, out, error.count("\n")) == (1, "", 1) and message in error


def test_audit(capsys, job, monkeypatch):
    covered = megatron_sp_fix.Tower("language_model", "GPTModel", "covered", "why")
    for verdict, expected in (("covered", 0), ("not covered", 1), ("cannot tell", 1)):
        monkeypatch.setattr(cli, "audit", lambda _, v=verdict: (covered._replace(verdict=v),))
        code, out, error = run(capsys, "audit", "somebodys:no_language_model")
        assert (code, error) == (expected, "")
        assert out == f"language_model: GPTModel: {verdict}: why\n"


def test_interrupted(capsys, job):
    assert run(capsys, "audit", "somebodys:interrupted") == (130, "", "")


def test_a_closed_pipe():
    command = f"{sys.executable} -m megatron_sp_fix status | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_megatron_core_missing():
    code = "import sys; sys.modules['megatron'] = None; import megatron_sp_fix.cli as cli; "
    command = [sys.executable, "-c", f"{code} sys.exit(cli.main(['status']))"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "megatron-core is not installed" in done.stderr
