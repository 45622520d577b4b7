# SPDX-License-Identifier: Apache-2.0
"""What a user meets first: the import, the command line and its errors."""

import json
import os
import subprocess
import sys

import pytest

from megatron_sp_fix import cli


def python(*args, **environment):
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_import_is_light():
    code = (
        "import sys, megatron_sp_fix; print([m for m in sys.modules if m in ('torch', 'megatron')])"
    )
    assert python("-c", code).stdout.strip() == "[]"


def test_everything_public_is_there():
    import megatron_sp_fix

    assert {"apply", "remove", "applied", "status"} <= set(megatron_sp_fix.__all__)
    for name in megatron_sp_fix.__all__:
        assert getattr(megatron_sp_fix, name).__doc__


def test_status_command(capsys):
    assert cli.main(["status"]) == 0
    text = capsys.readouterr().out
    assert "megatron-core" in text and "not patched" in text
    assert cli.main(["status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"version", "path", "sites"} <= found.keys()
    assert {"name", "native", "patched", "by"} == found["sites"][0].keys()


def test_module_runs():
    done = python("-m", "megatron_sp_fix", "--version")
    assert done.returncode == 0 and "megatron-sp-fix" in done.stdout


def test_megatron_core_missing():
    code = (
        "import sys; sys.modules['megatron'] = None\n"
        "from megatron_sp_fix.cli import main; sys.exit(main(['status']))"
    )
    done = python("-c", code)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "megatron-core is not installed" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--tp", "1"], "--tp 1 does not fit"),
        (["demo", "--tp", "0"], "--tp 0 does not fit"),
    ],
)
def test_usage_errors(capsys, arguments, message):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["demo", "--tp", "x"]])
def test_argparse_errors(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert capsys.readouterr().err.count("\n") == 1


COMMANDS = ["status", "demo", "run", "enable", "disable", "audit", "diff"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_gives_an_example_and_fits(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    assert "example:" in text and max(map(len, text.splitlines())) <= 80
