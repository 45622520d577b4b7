# SPDX-License-Identifier: Apache-2.0
"""Rules 12 and 13 on the real classes of the installed megatron-core, without ranks."""

import contextlib
import copy
import functools
import importlib
import inspect
import pickle
import sys
import threading
import types
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import megatron_sp_fix
from megatron_sp_fix import UnsupportedMegatronError, sites

FOUND = sites.supported(sites.installed_root())[0]
# In a tree that was patched in its source there is nothing to replace.
pytestmark = pytest.mark.skipif(FOUND[0].native == "this fix", reason="patched in its source")
ROW = FOUND[0]


@pytest.fixture(autouse=True)
def _removed():
    yield
    megatron_sp_fix.remove()


def classes():
    """The class and method of each call site that can be imported here, by name."""
    found = {}
    for site in FOUND:
        with contextlib.suppress(ImportError):
            owner = getattr(importlib.import_module(site.module), site.cls)
            found[f"{site.module}.{site.name}"] = (owner, site.method)
    return found


def objects():
    """The very objects that stand there."""
    return {name: vars(owner)[method] for name, (owner, method) in classes().items()}


def first():
    return next(iter(classes().values()))


@contextlib.contextmanager
def put(owner, name, value):
    """Set an attribute of a class or module as it is, and put back what was there."""
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def state():
    """State and author of the first call site."""
    row = megatron_sp_fix.status().sites[0]
    return row.state, row.by


def tower(cls=None, embeds=True):
    """A model that was never built, in a group of two: what a replacement asks of one."""
    cls = cls or first()[0]
    model = cls.__new__(cls)
    torch.nn.Module.__init__(model)
    model.config = SimpleNamespace(sequence_parallel=embeds, fp8=None, fp4=None)
    model.__dict__["embedding"] = SimpleNamespace(tp_group=SimpleNamespace(size=lambda: 2))
    return model


# Rule 12: reversible, and a good neighbour.


def test_rule_12_removing_gives_back_the_very_objects():
    before = objects()
    assert set(megatron_sp_fix.apply()) == before.keys()
    during = objects()
    assert all(during[name] is not before[name] for name in before)
    assert set(megatron_sp_fix.remove()) == before.keys()
    after = objects()
    assert all(after[name] is before[name] for name in before)


def test_rule_12_applying_twice_is_applying_once():
    before = objects()
    megatron_sp_fix.apply()
    once = objects()
    assert megatron_sp_fix.apply() == ()
    assert objects() == once
    megatron_sp_fix.remove()
    assert megatron_sp_fix.remove() == () and objects() == before


def test_rule_12_signature_name_and_pickle_are_the_originals():
    originals = objects()
    signatures = {name: inspect.signature(method) for name, method in originals.items()}
    with megatron_sp_fix.applied():
        for name, method in objects().items():
            assert inspect.signature(method) == signatures[name]
            assert method.__qualname__ == originals[name].__qualname__
            assert pickle.loads(pickle.dumps(method)) is method
            assert copy.deepcopy(method) is method


def test_rule_12_wrong_arguments_fail_as_the_original_does():
    method = ROW.method
    with megatron_sp_fix.applied(), pytest.raises(TypeError, match="unexpected keyword argument"):
        getattr(tower(), method)(no_such_argument=1)


def plainly(original):
    def theirs(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    return theirs


def wrapped(original):
    return functools.wraps(original)(plainly(original))


def by_wrapt(original):
    wrapt = pytest.importorskip("wrapt")
    return wrapt.FunctionWrapper(original, lambda call, self, args, kwargs: call(*args, **kwargs))


def partial_method(original):
    def tagged(self, tag, *args, **kwargs):
        assert tag == "tag"
        return original(self, *args, **kwargs)

    return functools.partialmethod(tagged, "tag")


class Descriptor:
    """Binds by itself, and keeps what it calls where nobody looks."""

    def __init__(self, original):
        self.hidden = [original]

    def __get__(self, instance, owner=None):
        return self if instance is None else functools.partial(self.hidden[0], instance)


PATCHES = {
    patch.__name__: patch for patch in (plainly, wrapped, by_wrapt, partial_method, Descriptor)
}


@pytest.mark.parametrize("acts", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", PATCHES)
def test_rule_12_patches_of_others_are_called_as_without_this_one(name, when, acts):
    owner, method = first()
    seen = []

    def original(self, *args, **kwargs):
        seen.append((self, args, kwargs, type(self.embedding).__name__))
        return "result"

    model, real = tower(embeds=acts), vars(owner)[method]
    with put(owner, method, original), contextlib.ExitStack() as stack:
        if when == "before":
            stack.enter_context(put(owner, method, PATCHES[name](vars(owner)[method])))
        megatron_sp_fix.apply()
        if when == "after":
            stack.enter_context(put(owner, method, PATCHES[name](vars(owner)[method])))
            expected = {"Descriptor": "cannot tell"}.get(name, "patched")
            by = "_wrap" if name == "by_wrapt" else "functools" if "partial" in name else __name__
            assert state()[0] == expected and by in state()[1]
        else:
            assert state() == ("patched", "megatron_sp_fix")
        ids, positions = object(), object()
        assert getattr(model, method)(ids, position_ids=positions) == "result"
        ((self, args, kwargs, embedding),) = seen
        assert self is model and args == (ids,) and kwargs == {"position_ids": positions}
        assert embedding == ("Sharding" if acts else "SimpleNamespace")
        assert type(model.embedding) is SimpleNamespace
        if when == "before":
            megatron_sp_fix.remove()
            assert state()[0] == "not patched"
    assert vars(owner)[method] is real


def test_rule_12_a_mock_is_called_as_without_this_one():
    owner, method = first()
    model = tower()
    with mock.patch.object(owner, method, return_value="result") as theirs:
        with megatron_sp_fix.applied():
            assert getattr(model, method)("ids", position_ids="positions") == "result"
        theirs.assert_called_once_with("ids", position_ids="positions")
        assert vars(owner)[method] is theirs


def test_rule_12_a_later_patch_stays_and_is_named():
    owner, method = first()
    original = vars(owner)[method]
    megatron_sp_fix.apply()
    ours = vars(owner)[method]
    with put(owner, method, theirs := plainly(ours)):
        assert megatron_sp_fix.apply() == ()
        assert state() == ("patched", __name__)
        with pytest.warns(UserWarning, match=rf"{method}: .*later patch.* stays"):
            assert f"{owner.__qualname__}.{method}" not in " ".join(megatron_sp_fix.remove())
        assert vars(owner)[method] is theirs and state() == ("not patched", __name__)
        assert len(megatron_sp_fix.apply()) == len(objects()) and state()[0] == "patched"
        megatron_sp_fix.remove()
        assert vars(owner)[method] is theirs
    setattr(owner, method, original)


def test_rule_12_a_later_patch_that_keeps_the_original_in_a_global():
    owner, method = first()
    megatron_sp_fix.apply()
    names = {"original": vars(owner)[method]}
    exec("def theirs(self, *args, **kwargs):\n    return original(self, *args, **kwargs)", names)
    with put(owner, method, functools.wraps(names["original"])(names["theirs"])):
        with megatron_sp_fix.applied():
            assert state()[0] == "patched"
        assert state()[0] == "patched"


def test_rule_12_a_replacement_that_is_put_back_once_removed_is_used_again():
    owner, method = first()
    original = vars(owner)[method]
    megatron_sp_fix.apply()
    ours = vars(owner)[method]
    with put(owner, method, plainly(ours)), pytest.warns(UserWarning, match="later patch"):
        megatron_sp_fix.remove()
    assert vars(owner)[method] is ours and state() == ("not patched", "megatron_sp_fix")
    megatron_sp_fix.apply()
    assert vars(owner)[method] is ours and state() == ("patched", "megatron_sp_fix")
    megatron_sp_fix.remove()
    assert vars(owner)[method] is original


def test_rule_12_what_hides_the_fix_is_patched_over_once():
    """A patch of which nobody can tell what it calls, applied to again: acted on by one only."""
    owner, method = first()
    seen = []

    def original(self, *args, **kwargs):
        seen.append(type(self.embedding).__name__)

    with put(owner, method, original):
        megatron_sp_fix.apply()
        with put(owner, method, Descriptor(vars(owner)[method])):
            assert state()[0] == "cannot tell"
            assert megatron_sp_fix.apply() != ()
            assert state() == ("patched", "megatron_sp_fix")
            getattr(tower(), method)()
            megatron_sp_fix.remove()
            getattr(tower(), method)()
    assert seen == ["Sharding", "SimpleNamespace"]


def test_rule_12_applied_nests():
    before = objects()
    with megatron_sp_fix.applied():
        with megatron_sp_fix.applied():
            pass
        assert objects() != before
    assert objects() == before
    megatron_sp_fix.apply()
    with megatron_sp_fix.applied():
        pass
    assert objects() != before


def test_rule_12_applied_is_undone_after_an_exception():
    before = objects()
    with pytest.raises(KeyError), megatron_sp_fix.applied():
        raise KeyError
    assert objects() == before


def test_rule_12_threads_leave_nothing_behind():
    before = objects()

    def race():
        for _ in range(30):
            megatron_sp_fix.apply()
            with megatron_sp_fix.applied():
                megatron_sp_fix.remove()

    threads = [threading.Thread(target=race) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    megatron_sp_fix.remove()
    assert objects() == before


@contextlib.contextmanager
def restored(module):
    """A module with what is in it now, whatever happens to it."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(before)


def test_rule_12_a_reloaded_module():
    owner, method = first()
    module, original = sys.modules[ROW.module], vars(owner)[method]
    with restored(module):
        megatron_sp_fix.apply()
        importlib.reload(module)
        anew = getattr(module, ROW.cls)
        assert anew is not owner and state()[0] == "not patched"
        fresh = vars(anew)[method]
        assert megatron_sp_fix.apply() == (f"{ROW.module}.{ROW.name}",)
        assert state()[0] == "patched"
        megatron_sp_fix.remove()
        assert vars(anew)[method] is fresh and vars(owner)[method] is original


@pytest.mark.parametrize("own", [True, False])
def test_rule_12_a_class_swapped_in_its_module(own):
    owner, method = first()
    real = vars(owner)[method]
    theirs = {method: plainly(real)} if own else {}
    cls = type("Swapped", (owner,), theirs)
    with put(sys.modules[ROW.module], ROW.cls, cls):
        megatron_sp_fix.apply()
        assert state()[0] == "patched"
        assert vars(owner)[method] is real or not own
        megatron_sp_fix.remove()
        assert vars(cls).get(method) is theirs.get(method) and vars(owner)[method] is real


@pytest.mark.parametrize("stub", [None, object(), mock.MagicMock(), type("GPTModel", (), {})])
def test_rule_12_a_stub_is_named_and_nothing_left_behind(stub):
    before = objects()
    module = types.ModuleType(ROW.module)
    if stub is not None:
        setattr(module, ROW.cls, stub)
    with mock.patch.dict(sys.modules, {ROW.module: module}):
        with pytest.raises(UnsupportedMegatronError, match=rf"{ROW.module} has no class {ROW.cls}"):
            megatron_sp_fix.apply()
        assert state() == ("not imported", "")
    assert objects() == before


# Rule 12, too: what `also` names is patched as the rest is, all or none.


class Own:
    """Embeds by itself, in a method with and one without a decoder's input."""

    config = SimpleNamespace(sequence_parallel=True, fp8=None, fp4=None)

    def __init__(self):
        self.embedding = SimpleNamespace(tp_group=SimpleNamespace(size=lambda: 2))

    def forward(self, input_ids, decoder_input=None):
        return type(self.embedding).__name__

    def draft(self, input_ids):
        return type(self.embedding).__name__


class Inherits(Own):
    pass


def generated():
    """A class without source, made as ModelOpt makes its own."""
    space = {}
    exec("def forward(self, input_ids, decoder_input=None): return type(self.embedding)", space)
    return type("Generated", (Own,), {"forward": space["forward"]})


def test_also_takes_classes_and_strings():
    before, original = objects(), vars(Own)["forward"]
    made = generated()
    replaced = megatron_sp_fix.apply(also=[Own, f"{__name__}:Own", f"{__name__}:Own.draft", made])
    mine = [name for name in replaced if __name__ in name]
    assert mine == [
        f"{__name__}.{name}" for name in ("Own.forward", "Own.draft", "Generated.forward")
    ]
    own = Own()
    assert own.forward(None) == own.draft(None) == made().forward(None).__name__ == "Sharding"
    assert own.forward(None, "given") == own.forward(None, decoder_input=0) == "SimpleNamespace"
    assert own.draft("given") == "Sharding"
    megatron_sp_fix.remove()
    assert vars(Own)["forward"] is original and objects() == before
    assert own.forward(None) == own.draft(None) == "SimpleNamespace"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (Inherits, "Inherits'> names no class with a _preprocess or forward of its own"),
        (f"{__name__}:Own.missing", "Own.missing' names no class with a missing of its own"),
        (f"{__name__}:Own.config", "Own.config' names no class"),
        (f"{__name__}:Missing", "Missing' names no class"),
        (f"{__name__}:objects", "objects' names no class"),
        (__name__, "names no class"),
        (Own(), "Own object at .* names no class"),
        (None, "None names no class"),
        ("no_such_module:Own", "cannot import 'no_such_module': No module named"),
        (":Own", "cannot import '': Empty module name"),
        (".relative:Own", "cannot import '.relative': the 'package' argument"),
    ],
)
def test_also_names_what_is_missing_and_replaces_nothing(name, message):
    before = objects()
    with pytest.raises(UnsupportedMegatronError, match=message):
        megatron_sp_fix.apply(also=[Own, name])
    assert objects() == before and Own().forward(None) == "SimpleNamespace"


class Varied(Own):
    """Takes positional arguments that have no names."""

    def forward(self, input_ids, *more, decoder_input=None):
        return type(self.embedding).__name__


def test_also_counts_no_parameter_after_a_star():
    with megatron_sp_fix.applied(also=[Varied]):
        assert Varied().forward(None, "some", "more") == "Sharding"
        assert Varied().forward(None, decoder_input="given") == "SimpleNamespace"


@pytest.mark.parametrize("also", [[Own], Own, f"{__name__}:Own"])
def test_also_in_a_block(also):
    with megatron_sp_fix.applied(also=also):
        assert Own().forward(None) == "Sharding"
    assert Own().forward(None) == "SimpleNamespace"


# Rule 13: `status` tells the truth.


def test_rule_13_status():
    assert {row.state for row in megatron_sp_fix.status().sites} <= {"not patched", "not imported"}
    replaced = megatron_sp_fix.apply()
    found = megatron_sp_fix.status()
    assert found.version == ".".join(map(str, sites.version(sites.installed_root())))
    assert found.root == str(sites.installed_root())
    assert [row.name for row in found.sites] == [row.name for row in FOUND]
    for row, native in zip(found.sites, (site.native for site in FOUND)):
        ours = any(name.endswith(f".{row.name}") for name in replaced)
        assert row.native == native
        assert (row.state, row.by) == (
            ("patched", "megatron_sp_fix") if ours else ("not imported", "")
        )


def test_rule_13_status_of_what_is_not_imported():
    with mock.patch.dict(sys.modules):
        del sys.modules[ROW.module]
        assert state() == ("not imported", "")


def test_rule_13_status_of_a_patch_that_replaces_the_fix():
    owner, method = first()
    megatron_sp_fix.apply()
    bypass = functools.wraps(vars(owner)[method])(lambda self, *args, **kwargs: None)
    for theirs in (lambda self, *args, **kwargs: None, bypass):
        with put(owner, method, theirs):
            assert state() == ("cannot tell", __name__)


def test_rule_13_a_patch_in_place_of_the_original():
    """Somebody puts back what stood there before, as a context manager of theirs does."""
    owner, method = first()
    original = vars(owner)[method]
    megatron_sp_fix.apply()
    setattr(owner, method, original)
    assert state() == ("not patched", "")
    assert megatron_sp_fix.apply() == (f"{ROW.module}.{ROW.name}",)
    assert state()[0] == "patched"
    megatron_sp_fix.remove()
    assert vars(owner)[method] is original
