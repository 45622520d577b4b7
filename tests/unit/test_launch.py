# SPDX-License-Identifier: Apache-2.0
"""`run` becomes the command itself; `enable` does the same for all of an environment."""

import subprocess
from pathlib import Path

import pytest

from megatron_sp_fix import cli, launch

SCRIPT = """
import os, sys
print(sys.argv, sys.path, __name__, __file__, sys.flags.dev_mode, sys.stdout.write_through)
kind = sys.argv[1]
if kind == "raise":
    raise KeyError("what was looked for")
elif kind == "exit":
    sys.exit(3)
elif kind == "terminate":
    import signal
    os.kill(os.getpid(), signal.SIGTERM)
elif kind == "spawn":
    import multiprocessing
    if __name__ == "__main__":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(str.upper, ("done",)))
"""
STATE = (
    "import sys; print(any(type(f).__module__ == 'megatron_sp_fix.hook' for f in sys.meta_path), "
    "[name for name in ('megatron_sp_fix', 'typing', 're') if name in sys.modules])"
)


def python(environment, *command, **variables):
    done = subprocess.run(
        [environment.python, *command],
        cwd=environment.folder,
        env={**environment.variables, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def fix(environment, *command, **variables):
    return python(environment, "-m", "megatron_sp_fix", *command, **variables)


@pytest.fixture
def packages(environment):
    (folder,) = (environment.folder / "environment").glob("lib/python*/site-packages")
    return folder


@pytest.mark.parametrize("kind", ["raise", "exit", "terminate", "spawn"])
def test_the_command_is_itself(environment, kind):
    (environment.folder / "script.py").write_text(SCRIPT)
    for command in (["script.py"], ["-m", "script"]):
        command += [kind, "--also", "x", "-m", "--"]
        plain = python(environment, *command)
        assert fix(environment, "run", *command) == plain
        assert fix(environment, "run", environment.python, *command) == plain
    plain = python(environment, "-u", "-X", "dev", "script.py", kind)
    options = "-u", "-X", "dev", "-m", "megatron_sp_fix", "run", "script.py", kind
    assert python(environment, *options) == plain


def test_the_command_has_signals_as_it_would_have(environment):
    # Python ignores this one, which would be inherited.
    assert fix(environment, "run", "sh", "-c", "kill -s PIPE $$; echo ignored")[:2] == (-13, "")


def test_the_options_of_the_command_are_its_own(environment):
    show = "import sys; print(sys.argv[1:])"
    (environment.folder / "show.py").write_text(show)
    options = ["--path", "--also", "x", "-m", "-h", "--", "--"]
    other = [environment.python, "show.py"]
    for command in (["show.py"], ["-m", "show"], ["--", "show.py"], other):
        for own in ([], ["--also", "a:B"], ["--also=a:B"]):
            assert fix(environment, "run", *own, *command, *options)[1] == f"{options}\n"


def test_every_python_below_has_the_hook_and_little_else(environment):
    inner = [environment.python, "-c", STATE]
    command = ["sh", "-c", 'echo "$1"; exec "$@"', "sh", *inner]
    found = "True []\n"
    assert fix(environment, "run", *command) == (0, f"{environment.python}\n{found}", "")
    path = fix(environment, "run", "--path")[1].strip()
    assert path == launch.FOLDER
    assert python(environment, *inner[1:], PYTHONPATH=path)[1] == found
    # Once only, though two of them are on the path.
    assert fix(environment, "run", *command, PYTHONPATH=path)[1].endswith(found)
    assert python(environment, *inner[1:], PYTHONPATH=path, MEGATRON_SP_FIX="0")[1] == "False []\n"


def test_also_reaches_the_command(environment):
    show = "import os; print(os.environ['MEGATRON_SP_FIX_ALSO'])"
    also = ("--also", "a:B", "--also", "c:D.e", environment.python, "-c", show)
    assert fix(environment, "run", *also)[1] == "a:B,c:D.e\n"
    assert fix(environment, "run", *also, MEGATRON_SP_FIX_ALSO="x:Y")[1] == "x:Y,a:B,c:D.e\n"


def test_a_sitecustomize_that_is_there_runs_too(environment):
    (environment.folder / "sitecustomize.py").write_text("import sys\nname = __name__\nprint(1)")
    command = (environment.python, "-c", f"{STATE}; import sitecustomize as s; print(s.name)")
    path = str(environment.folder)
    done = fix(environment, "run", *command, PYTHONPATH=path)
    # Its first line is by the process of `run` itself.
    assert done == (0, "1\n1\nTrue []\nsitecustomize\n", "")
    (environment.folder / "sitecustomize.py").write_text("raise KeyError('theirs')")
    code, out, error = fix(environment, "run", *command[:2], STATE, PYTHONPATH=path)
    assert (code, out) == (0, "True []\n") and error.count("KeyError: 'theirs'") == 2


def test_a_python_without_the_package_says_so_and_goes_on(environment, packages):
    (packages / "_paths.pth").unlink()
    code, out, error = python(environment, "-c", "print(1)", PYTHONPATH=launch.FOLDER)
    assert (code, out, error.count("\n")) == (0, "1\n", 1)
    assert error.startswith(f"megatron-sp-fix: off: {environment.python} has no megatron_sp_fix")


def test_errors_of_run(environment):
    for command, expected in ((["no-such-program"], 2), ([], 2), (["--frobnicate", "x"], 2)):
        code, out, error = fix(environment, "run", *command)
        assert (code, out, error.count("\n")) == (expected, "", 1), error
    code, _, error = python(environment, "-E", "-m", "megatron_sp_fix", "run", "script.py")
    assert code == 2 and "without -I, -E and -S" in error


def test_enable_and_disable(environment, packages):
    file = packages / "megatron_sp_fix_enabled.pth"
    for _ in range(2):
        code, out, error = fix(environment, "enable")
        assert (code, error) == (0, "") and out.startswith(f"wrote {file};")
        assert "as it is imported" in out and "GPTModel._preprocess" in out
    assert python(environment, "-c", STATE)[1] == "True []\n"
    assert python(environment, "-I", "-c", STATE)[1] == "True []\n"
    before = python(environment, "-c", "import sys; print(sys.path)", MEGATRON_SP_FIX="0")
    assert launch.FOLDER not in before[1]
    assert fix(environment, "disable")[:2] == (0, f"removed {file}\n") and not file.exists()
    assert fix(environment, "disable")[:2] == (0, "nothing to remove: it was not enabled\n")
    assert python(environment, "-c", STATE)[1] == "False []\n"


def test_enable_where_nothing_will_be_patched(environment):
    code, out, error = fix(environment, "enable", MEGATRON_SP_FIX="0")
    assert code == 1 and "import hook: none" in out and "would run unpatched" in error


@pytest.mark.parametrize("command", ["enable", "disable"])
def test_a_folder_that_is_not_there_or_not_yours(monkeypatch, capsys, command):
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/dev/null")
    assert cli.main([command]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "/dev/null/megatron_sp_fix" in error and "yours" in error


def test_enable_writes_a_path_that_every_locale_reads(packages, monkeypatch):
    """Python reads the file in the locale's encoding, and does not start where it cannot."""
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(packages))
    monkeypatch.setattr(launch, "FOLDER", "/nowhere/é")
    assert Path(launch.enable()).read_bytes().isascii()


def test_silent_once_the_package_is_gone(environment, packages, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(packages))
    monkeypatch.setattr(launch, "FOLDER", "/nowhere/it's/gone")
    launch.enable()
    assert python(environment, "-c", STATE) == (0, "False []\n", "")
