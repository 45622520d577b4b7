# SPDX-License-Identifier: Apache-2.0
"""`run` runs a script as plain Python does, and megatron-core with the fix."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, pickle, sys
print(sys.argv, sys.path[0], __name__, __file__, __package__, getattr(__spec__, "name", None),
      type(__loader__).__name__)
print(sys.modules["__main__"].__dict__ is globals())
class Mine:
    pass
assert pickle.loads(pickle.dumps(Mine)) is Mine
def deep():
    raise KeyError("what was looked for")
kind = sys.argv[1] if len(sys.argv) > 1 else ""
if kind == "raise":
    deep()
elif kind == "chain":
    try:
        deep()
    except KeyError as error:
        raise ValueError("because") from error
elif kind == "exit":
    sys.exit(3)
elif kind == "message":
    sys.exit("a last word")
elif kind == "terminate":
    import signal
    os.kill(os.getpid(), signal.SIGTERM)
elif kind == "interrupt":
    import signal
    signal.raise_signal(signal.SIGINT)
elif kind == "thread":
    import threading, time
    def late():
        time.sleep(0.1)
        print("late", sys.modules["__main__"].Mine is Mine)
    threading.Thread(target=late).start()
elif kind == "spawn":
    import multiprocessing
    if __name__ == "__main__":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.apply(str.upper, ("done",)), pool.apply(type, (Mine(),)))
"""

PATCHED = (
    "import megatron_sp_fix\n"
    "print([s.patched for s in megatron_sp_fix.status().sites if 'GPT' in s.name])\n"
)


def python(folder, *command):
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


KINDS = ["", "raise", "chain", "exit", "message", "terminate", "interrupt", "thread", "spawn"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_script_runs_as_without(tmp_path, kind):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/script.py").write_text(SCRIPT)
    command = ("folder/script.py", *([kind, "--foo", "-m", "--", "x"] if kind else []))
    plain = python(tmp_path, *command)
    assert python(tmp_path, "-m", "megatron_sp_fix", "run", *command) == plain
    assert "Mine" in plain[1] or kind != "spawn", plain


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_runs_as_without(tmp_path, kind):
    (tmp_path / "package").mkdir()
    (tmp_path / "package/job.py").write_text(SCRIPT)
    command = ("-m", "package.job", *([kind, "--foo", "--", "x"] if kind else []))

    def outcome(*command):
        code, out, error = python(tmp_path, *command)
        # Both have frames of runpy, in which they run a module by different functions.
        lines = [line for line in error.splitlines() if "<frozen runpy>" not in line]
        return code, out, lines

    assert outcome("-m", "megatron_sp_fix", "run", *command) == outcome(*command)


def test_a_path_through_a_link(tmp_path):
    (tmp_path / "elsewhere/inner").mkdir(parents=True)
    (tmp_path / "elsewhere/script.py").write_text("print(__file__, __annotations__)")
    (tmp_path / "link").symlink_to("elsewhere/inner")
    for command in ("link/../script.py", "./link/../script.py"):
        plain = python(tmp_path, command)
        assert plain[0] == 0 and python(tmp_path, "-m", "megatron_sp_fix", "run", command) == plain


def test_a_package_that_fails_by_itself(tmp_path):
    """Its parents are imported as of a plain run: with their own errors, and with the fix."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/__init__.py").write_text("import not_there_at_all")
    (tmp_path / "broken/job.py").write_text("")
    code, _, error = python(tmp_path, "-m", "megatron_sp_fix", "run", "-m", "broken.job")
    assert code == 1 and "No module named 'not_there_at_all'" in error and "Traceback" in error
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text(
        "import sys; print(sys.argv)\nfrom megatron.core.models.gpt import GPTModel"
    )
    (tmp_path / "package/job.py").write_text(PATCHED)
    code, out, _ = python(tmp_path, "-m", "megatron_sp_fix", "run", "-m", "package.job", "x")
    assert (code, out) == (0, "['-m', 'x']\n[True]\n")


def test_a_script_with_an_error_of_syntax(tmp_path):
    (tmp_path / "script.py").write_text("x = = 1\n")
    assert python(tmp_path, "-m", "megatron_sp_fix", "run", "script.py") == python(
        tmp_path, "script.py"
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "name a script"),
        (["missing.py"], "no script /"),
        (["-m", "missing.module"], "no module named 'missing.module'"),
        (["."], "no script /"),
        (["-m", "math"], "no module named 'math' that can be run"),
        (["-x"], "name a script"),
    ],
)
def test_usage_errors(tmp_path, command, message):
    code, out, error = python(tmp_path, "-m", "megatron_sp_fix", "run", *command)
    assert (code, out) == (2, "")
    assert message in error and error.count("\n") == 1


def test_megatron_core_is_patched(tmp_path):
    (tmp_path / "script.py").write_text("from megatron.core.models.gpt import GPTModel\n" + PATCHED)
    code, out, _ = python(tmp_path, "-m", "megatron_sp_fix", "run", "script.py")
    assert (code, out) == (0, "[True]\n")


def test_off_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_SP_FIX", "0")
    (tmp_path / "script.py").write_text("print(1)")
    done = python(tmp_path, "-m", "megatron_sp_fix", "run", "script.py")
    assert done == (0, "1\n", "megatron-sp-fix: off, by MEGATRON_SP_FIX=0\n")
