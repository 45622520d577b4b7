# SPDX-License-Identifier: Apache-2.0
"""`enable` and `disable`, and the import hook by which an enabled process gets the fix."""

import os
import stat
import subprocess
import sys

import pytest

from megatron_sp_fix import sites, startup

MODULES = sorted({match.site.module for match in sites.find(sites.installed_root())})
PATCHED = (
    "import megatron_sp_fix; print({s.name: s.patched for s in megatron_sp_fix.status().sites})"
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


def pth(environment):
    (packages,) = (environment.folder / "environment").glob("lib/python*/site-packages")
    return packages / startup.FILE


def test_enable_and_disable(environment):
    file = pth(environment)
    for _ in range(2):
        code, out, error = fix(environment, "enable")
        assert (code, error) == (0, "") and out.endswith(f"has the fix now, by {file}\n")
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert [name for name in os.listdir(file.parent) if "megatron_sp_fix" in name] == [file.name]
    code, out, error = fix(environment, "status")
    assert code == 0 and f"enabled for every process by {file}" in out
    assert "patched on import" in out
    code, out, error = fix(environment, "status", MEGATRON_SP_FIX="0")
    assert code == 0 and "not in this one: MEGATRON_SP_FIX=0" in out
    code, out, error = fix(environment, "disable")
    assert code == 0 and str(file) in out and not file.exists()
    code, out, error = fix(environment, "disable")
    assert code == 0 and "nothing to remove" in out
    assert "not enabled" in fix(environment, "status")[1]


def test_a_stale_file_is_named_and_left(environment):
    file = pth(environment)
    file.write_text("# Written by megatron-sp-fix 0.0.1; more\nimport sys\n")
    code, _, error = fix(environment, "enable")
    assert code == 1 and error.count("\n") == 1 and "disable" in error and str(file) in error
    assert "0.0.1" in file.read_text()
    assert fix(environment, "disable")[0] == 0 and not file.exists()


def test_somebody_elses_file_is_left(environment):
    file = pth(environment)
    file.write_text("import os  # not ours\n")
    for command in ("enable", "disable"):
        code, _, error = fix(environment, command)
        assert code == 1 and error.count("\n") == 1 and "not written by megatron-sp-fix" in error
    assert file.read_text() == "import os  # not ours\n"


@pytest.mark.skipif(os.getuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(environment):
    folder = pth(environment).parent
    folder.chmod(0o555)
    try:
        code, _, error = fix(environment, "enable")
    finally:
        folder.chmod(0o755)
    assert code == 1 and error.count("\n") == 1 and "as its owner" in error


@pytest.mark.parametrize("name", ["tempfile.mkdtemp", "os.replace", "subprocess.run"])
def test_a_failure_leaves_nothing(environment, monkeypatch, name):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied", "there")

    monkeypatch.setattr(name, fail)
    monkeypatch.setattr("sys.executable", environment.python)
    monkeypatch.setattr(startup, "_file", lambda: str(pth(environment)))
    with pytest.raises(startup.StartupError, match=r"Permission denied.*as its owner"):
        startup.enable()
    assert not [each for each in os.listdir(pth(environment).parent) if startup.FILE[:-4] in each]


def test_an_environment_whose_processes_do_not_find_the_package(environment):
    # As one whose site-packages hold no megatron_sp_fix: PYTHONPATH alone names it, here and now.
    paths = pth(environment).with_name("_paths.pth")
    paths.rename(paths.with_suffix(".txt"))
    root = os.path.dirname(os.path.dirname(startup.__file__))
    status, _, error = fix(environment, "enable", PYTHONPATH=root)
    assert status == 1 and "into the environment itself" in error, error
    assert not pth(environment).exists()


def test_two_at_once(environment):
    command = [environment.python, "-m", "megatron_sp_fix", "enable"]
    both = [subprocess.Popen(command, env=environment.variables) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0] and pth(environment).exists()


def test_only_folders_that_site_reads_count(environment):
    (environment.folder / startup.FILE).write_text(startup._text())
    assert "not enabled" in fix(environment, "status", PYTHONPATH=str(environment.folder))[1]


def test_silent_once_the_package_is_gone(environment):
    assert fix(environment, "enable")[0] == 0
    paths = pth(environment).with_name("_paths.pth")
    paths.unlink()
    assert python(environment, "-c", "print(1)") == (0, "1\n", "")


@pytest.mark.parametrize("module", MODULES)
def test_each_module_is_patched_as_it_is_imported(environment, module):
    assert fix(environment, "enable")[0] == 0
    code = f"import {module}\n{PATCHED}"
    status, out, error = python(environment, "-W", "ignore", "-c", code)
    assert status == 0, error
    patched = eval(out)
    for match in sites.find(sites.installed_root()):
        if match.site.module == module:
            assert patched[match.site.name]
    # In any order with all others, and with `apply()`.
    code = f"import {module}, megatron_sp_fix\nmegatron_sp_fix.apply()\n{PATCHED}"
    status, out, error = python(environment, "-W", "ignore", "-c", code)
    assert status == 0 and all(eval(out).values()), error


GPT = "from megatron.core.models.gpt import GPTModel; "


def test_off_for_a_process(environment):
    assert fix(environment, "enable")[0] == 0
    status, out, _ = python(environment, "-c", GPT + PATCHED, MEGATRON_SP_FIX="0")
    assert status == 0 and not any(eval(out).values())


def test_the_names_of_the_modules():
    assert {site.module for site in sites.SITES} == startup.MODULES


def test_remove_reaches_what_is_imported_later(environment):
    assert fix(environment, "enable")[0] == 0
    code = "import megatron_sp_fix; megatron_sp_fix.remove(); " + GPT + PATCHED
    status, out, _ = python(environment, "-c", code)
    assert status == 0 and not any(eval(out).values())


@pytest.mark.parametrize(
    ("cause", "variables", "message"),
    [
        (
            "import megatron_sp_fix.sites as s; s.NEWEST = s.OLDEST = (99, 0)\n"
            "import megatron_sp_fix.runtime as r; r.OLDEST = (99, 0)\n",
            {},
            "is older than 99.0",
        ),
        ("", {"MEGATRON_SP_FIX": "of"}, "MEGATRON_SP_FIX=of is none of 0, 1 and strict"),
    ],
)
def test_a_failure_is_one_error_and_no_patch(environment, cause, variables, message):
    assert fix(environment, "enable")[0] == 0
    code = cause + GPT + PATCHED
    status, out, error = python(environment, "-W", "ignore", "-c", code, **variables)
    assert status == 0 and not any(eval(out).values()), error
    lines = [line for line in error.splitlines() if "megatron-sp-fix" in line]
    assert len(lines) == 1 and message in lines[0]
    if not variables:
        variables = {"MEGATRON_SP_FIX": "strict"}
        status, _, error = python(environment, "-W", "ignore", "-c", code, **variables)
        assert status == 1 and "UnsupportedMegatronError" in error and message in error
        # Somebody's `try` does not let a job go on unpatched.
        tries = "try:\n    import megatron.core.models.gpt.gpt_model\nexcept Exception: pass\n"
        status, _, error = python(
            environment, "-W", "ignore", "-c", cause + tries + GPT, **variables
        )
        assert status == 1 and message in error


def test_an_import_that_fails_can_be_repeated():
    """As `try: import ... except ImportError` does: the hook acts when it succeeds at last."""
    code = """
import sys
from megatron_sp_fix import startup
startup.install()
sys.modules["megatron.core.models.common.language_module.language_module"] = None
try:
    import megatron.core.models.gpt.gpt_model
except ImportError:
    pass
else:
    sys.exit(9)
del sys.modules["megatron.core.models.common.language_module.language_module"]
from megatron.core.models.gpt.gpt_model import GPTModel
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code + PATCHED],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and eval(done.stdout)["GPTModel._preprocess"], done.stderr


def test_finders_that_ask_all_others(environment):
    """As ours does: two of that kind must not ask each other for ever."""
    assert fix(environment, "enable")[0] == 0
    code = """
import sys
class Asking:
    def find_spec(self, name, path=None, target=None):
        for finder in sys.meta_path:
            if finder is not self:
                spec = finder.find_spec(name, path, target)
                if spec:
                    return spec
sys.meta_path.insert(0, Asking())
for name in [name for name in sys.modules if name.startswith("megatron_sp_fix")]:
    del sys.modules[name]
from megatron_sp_fix import startup
startup.install()
"""
    status, out, error = python(environment, "-W", "ignore", "-c", code + GPT + PATCHED)
    assert status == 0 and eval(out)["GPTModel._preprocess"], error


def test_imports_in_threads(environment):
    """No thread waits for another's import while that waits for ours."""
    code = """
import importlib, sys, threading
from megatron_sp_fix import startup
names = [*startup.MODULES, "inspect", "megatron_sp_fix.runtime", "dataclasses", "logging", "ast"]
def load(name):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
threads = [threading.Thread(target=load, args=(name,), daemon=True) for name in names]
[thread.start() for thread in threads]
[thread.join(60) for thread in threads]
assert not any(thread.is_alive() for thread in threads)
import megatron_sp_fix
with megatron_sp_fix.applied():
    pass
assert startup.installed()
"""
    assert fix(environment, "enable")[0] == 0
    status, out, error = python(environment, "-W", "ignore", "-c", code + GPT + PATCHED)
    assert status == 0 and eval(out)["GPTModel._preprocess"], error
