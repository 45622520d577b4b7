# SPDX-License-Identifier: Apache-2.0
"""The import hook patches megatron-core as it is imported, or says so.

Each test runs in a fork that imports megatron-core's own modules anew, with all others loaded.
"""

import contextlib
import importlib
import importlib.machinery
import inspect
import os
import sys
import threading
import traceback
import types

import pytest

import megatron.core.models.gpt.gpt_model as loaded
import megatron_sp_fix
from megatron_sp_fix import hook, patching, sites

GPT = "megatron.core.models.gpt.gpt_model"
MTP = "megatron.core.transformer.multi_token_prediction"


def child(function, **variables):
    """Run a function in a fork with the hook, up to its exit: status and all that was written."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(write, 1), os.dup2(write, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            patching._removed = False
            for name in (*hook.RANKS, "MEGATRON_SP_FIX", "MEGATRON_SP_FIX_ALSO"):
                os.environ.pop(name, None)
            os.environ.update(variables)
            for name in hook.MODULES:
                sys.modules.pop(name, None)
            hook.install()
            finder = sys.meta_path[0]
            function()
            finder.check_at_exit()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    os.close(write)
    with open(read) as stream:
        text = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def load(*names):
    modules = [importlib.import_module(name) for name in names or (GPT,)]
    return modules[0]


def states():
    return {site.name.split(".")[0]: site.state for site in megatron_sp_fix.status().sites}


def test_the_names_are_those_of_the_table():
    assert {site.module for site in sites.SITES} < hook.MODULES
    (other,) = hook.MODULES - {site.module for site in sites.SITES}
    assert f'"{other}"' in inspect.getsource(patching)


@pytest.mark.parametrize(
    ("variables", "lines"),
    [
        ({}, 1),
        ({"RANK": "0", "SLURM_PROCID": "1"}, 1),
        ({"RANK": "1", "SLURM_PROCID": "0"}, 0),
        ({"OMPI_COMM_WORLD_RANK": "1"}, 0),
    ],
)
def test_patched_as_imported_and_said_once_by_rank_0(variables, lines):
    def function():
        load()
        assert states()["GPTModel"] == states()["MultiTokenPredictionLayer"] == "patched"
        assert isinstance(loaded.__spec__.loader, type(load().__spec__.loader))  # its own

    status, text = child(function, **variables)
    said = [line for line in text.splitlines() if line.startswith("megatron-sp-fix: patched")]
    assert status == 0 and len(said) == lines, text
    found = megatron_sp_fix.status()
    where = f" in megatron-core {found.version} at {found.root}"
    assert all("GPTModel." in line and "MultiToken" in line for line in said)
    assert all(line.endswith(where) for line in said)


@pytest.mark.parametrize("stream", ["full", "no flush"])
def test_a_line_that_cannot_be_written_ends_no_job(stream):
    def function():
        with open("/dev/full", "w", buffering=1) as full:
            taken = full if stream == "full" else types.SimpleNamespace(write=full.name.join)
            with contextlib.redirect_stderr(taken):
                load()
            assert states()["GPTModel"] == "patched"
            os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # what it holds goes there

    assert child(function) == (0, "")


def test_eagle():
    """ModelOpt's, whose module `apply_to` names by itself."""
    pytest.importorskip("modelopt")
    pytest.importorskip("transformers")
    (name,) = hook.MODULES - {site.module for site in sites.SITES}

    def function():
        methods = vars(load(name)._DynamicEagleGPTModel)
        assert hasattr(methods["_base_model_forward"], "__wrapped__")

    status, text = child(function)
    assert status == 0, text


def test_reload_patches_anew():
    def function():
        importlib.reload(load())
        assert states()["GPTModel"] == "patched"

    assert child(function) == (0, child(load)[1])


@pytest.fixture
def own(tmp_path, monkeypatch):
    text = "class Model:\n    def embed(self, input_ids):\n        pass\n"
    (tmp_path / "of_somebody.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "of_somebody"


def test_also(own):
    def function():
        embed = load(own).Model.embed
        assert embed is not inspect.unwrap(embed)

    assert child(function, MEGATRON_SP_FIX_ALSO=f"{own}:Model.embed")[0] == 0
    status, text = child(function, MEGATRON_SP_FIX_ALSO=f"{own}:Model.missing")
    assert status == 1 and "Model.missing' names no class with a missing of its own" in text


def test_also_a_module_that_is_never_imported():
    status, text = child(load, MEGATRON_SP_FIX_ALSO="somebodies:Model")
    assert status == 0 and "--also somebodies:Model: not patched" in text.splitlines()[-1]


@pytest.mark.parametrize("name", ["somebodys.models.Model", "__main__:Model"])
def test_also_what_no_import_reaches(name):
    status, text = child(load, MEGATRON_SP_FIX_ALSO=name)
    assert status == 1 and f"--also {name} is no MODULE:CLASS" in text
    status, text = child(load, MEGATRON_SP_FIX_ALSO=name, MEGATRON_SP_FIX="warn")
    assert status == 0 and text.count("\n") == 1
    assert f"off in this process: --also {name} is no MODULE:CLASS" in text


def too_new():
    sites.supported.cache_clear()
    sites.OLDEST = (99, 0)


def test_a_failure_raises_at_every_import_and_leaves_megatron_core_as_it_was():
    def function():
        too_new()
        for _ in range(2):
            with pytest.raises(sites.UnsupportedMegatronError, match="too old"):
                load()
        assert not [patch for patch in patching._patches.values() if patch.active]

    assert child(function) == (0, "")


def test_a_failure_of_a_later_module_takes_back_the_first(own):
    def function():
        embed = load(MTP).MultiTokenPredictionLayer.__dict__
        before = [value for value in embed.values() if hasattr(value, "__wrapped__")]
        for name in (own, GPT):  # a job that caught the first does not go on without the fix
            with pytest.raises(sites.UnsupportedMegatronError, match="missing' names no class"):
                load(name)
        assert before
        assert not [value for value in embed.values() if hasattr(value, "__wrapped__")]

    status, text = child(function, MEGATRON_SP_FIX_ALSO=f"{own}:Model.missing")
    assert status == 0, text


def test_a_failure_that_only_warns():
    def function():
        too_new()
        load()
        assert not [patch for patch in patching._patches.values() if patch.active]

    status, text = child(function, MEGATRON_SP_FIX="warn")
    assert status == 0 and text.count("\n") == 1 and "off in this process: megatron-core" in text


def test_a_release_newer_than_tested_is_said():
    def function():
        sites.supported.cache_clear()
        sites.NEWEST = (0, 11)
        load()

    status, text = child(function)
    assert status == 0 and "is newer than 0.11" in text and text.count("\n") == 1


def test_a_mode_that_does_not_exist():
    status, text = child(load, MEGATRON_SP_FIX="of")
    assert status == 1 and "MEGATRON_SP_FIX=of is none of 0, 1 and warn" in text


class Asking:
    """Finds by asking all others, as this package's does, and some of jaxtyping's kind."""

    def find_spec(self, name, path=None, target=None):
        found = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
        return next(filter(None, found), None)


class Hiding:
    """Finds by Python's own finder alone, as typeguard's does."""

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            return importlib.machinery.PathFinder.find_spec(name, path, target)


@pytest.mark.parametrize("place", [0, 1])
def test_finders_that_ask_all_others(place):
    def function():
        sys.meta_path.insert(place, Asking())
        load()
        assert states()["GPTModel"] == "patched"

    assert child(function)[0] == 0


class Wrapping:
    """Wraps the loader that others find, and lends it no attribute, as some coverage tools do."""

    def find_spec(self, name, path=None, target=None):
        spec = Asking.find_spec(self, name, path, target)
        if spec and name == GPT:
            spec.loader = OfWrapping(spec.loader)
        return spec


class OfWrapping:
    def __init__(self, loader):
        self.create_module, self.exec_module = loader.create_module, loader.exec_module


def test_a_finder_in_front_that_wraps_the_loader():
    def function():
        sys.meta_path.insert(0, Wrapping())
        assert isinstance(load().__loader__, OfWrapping)
        assert states()["GPTModel"] == "patched"

    assert child(function)[0] == 0


def hide(name):
    sys.meta_path.insert(0, Hiding())
    Hiding.name = name


def test_a_finder_in_front_is_an_error_at_the_next_import():
    def function():
        hide(MTP)
        with pytest.raises(RuntimeError, match=r"MultiTokenPredictionLayer.* not patched"):
            load()

    assert child(function) == (0, "")


@pytest.mark.parametrize(("mode", "expected"), [("", 1), ("warn", 0)])
def test_a_finder_in_front_is_an_error_at_exit(mode, expected):
    def function():
        hide(GPT)
        load(MTP, GPT)

    status, text = child(function, MEGATRON_SP_FIX=mode)
    assert status == expected and "GPTModel" in text.splitlines()[-1], text
    assert "import megatron-core before that hook" in text


def test_removed_before_it_is_imported():
    def function():
        megatron_sp_fix.remove()
        load()
        with megatron_sp_fix.applied():
            assert states()["GPTModel"] == "patched"
        load(MTP)
        assert {*states().values()} == {"not patched"}

    assert child(function) == (0, "")


def test_stubs_of_a_jobs_own_tests():
    def function():
        for name in ("megatron", "megatron.core", GPT):
            sys.modules[name] = types.ModuleType(name)
            del sys.modules[name].__spec__

    assert child(function) == (0, "")


def test_a_block_takes_back_nothing_of_the_hook():
    def function():
        with megatron_sp_fix.applied():
            pass
        assert {*states().values()} == {"patched"}

    assert child(function)[0] == 0


def test_an_import_that_fails_can_be_repeated():
    def function():
        name = "megatron.core.models.common.language_module.language_module"
        module, sys.modules[name] = sys.modules[name], None
        with pytest.raises(ImportError):
            load()
        sys.modules[name] = module
        load()
        assert states()["GPTModel"] == "patched"

    assert child(function)[0] == 0


def test_imports_in_threads():
    def function():
        for name in [n for n in sys.modules if n.startswith("megatron_sp_fix.p")]:
            del sys.modules[name]
        names = (
            *{site.module for site in sites.SITES},
            "megatron_sp_fix.patching",
            "dataclasses",
            "wave",
        )
        threads = [threading.Thread(target=_try, args=(n,), daemon=True) for n in names]
        [thread.start() for thread in threads]
        [thread.join(200) for thread in threads]
        assert not any(thread.is_alive() for thread in threads)

    status, text = child(function)
    assert status == 0, text


def _try(name):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
