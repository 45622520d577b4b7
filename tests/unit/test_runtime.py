# SPDX-License-Identifier: Apache-2.0
"""Rule 11 and the public surface, on the real classes of the installed megatron-core."""

import copy
import importlib
import inspect
import logging
import pickle
import threading

import pytest

import megatron_sp_fix
from megatron_sp_fix import sites


@pytest.fixture(autouse=True)
def _removed():
    yield
    megatron_sp_fix.remove()


def methods():
    """The very objects at every call site that can be imported here."""
    found = {}
    for match in sites.find(sites.installed_root()):
        try:
            owner = getattr(importlib.import_module(match.site.module), match.site.cls)
        except ImportError:
            continue
        found[f"{match.site.module}.{match.site.name}"] = (owner, match.site.method)
    return found


def objects():
    return {name: owner.__dict__[method] for name, (owner, method) in methods().items()}


def test_rule_11_removing_gives_back_the_very_objects():
    before = objects()
    replaced = megatron_sp_fix.apply()
    assert set(replaced) == before.keys()
    during = objects()
    assert all(during[name] is not before[name] for name in before)
    assert set(megatron_sp_fix.remove()) == before.keys()
    after = objects()
    assert all(after[name] is before[name] for name in before)


def test_rule_11_applying_twice_is_applying_once():
    before = objects()
    megatron_sp_fix.apply()
    once = objects()
    assert megatron_sp_fix.apply() == ()
    assert objects() == once
    megatron_sp_fix.remove()
    assert megatron_sp_fix.remove() == ()
    assert objects() == before


def test_rule_11_a_later_patch_is_reported_and_left(caplog):
    owner, method = methods()[next(iter(methods()))]
    original = owner.__dict__[method]
    megatron_sp_fix.apply()
    ours = owner.__dict__[method]

    def theirs(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    setattr(owner, method, theirs)
    try:
        with caplog.at_level(logging.INFO, "megatron_sp_fix"):
            assert megatron_sp_fix.apply() == ()
        assert f"carries a later patch by {__name__}" in caplog.text
        by = next(s.by for s in megatron_sp_fix.status().sites if s.name.endswith(method))
        assert by == (__name__, "megatron_sp_fix")
        assert owner.__qualname__ + "." + method not in " ".join(megatron_sp_fix.remove())
        assert (
            owner.__dict__[method] is theirs and f"patch by {__name__}, which stays" in caplog.text
        )
        by = next(s.by for s in megatron_sp_fix.status().sites if s.name.endswith(method))
        assert by == (__name__,)
        # The one below theirs works again, and there is only one.
        assert len(megatron_sp_fix.apply()) == len(methods())
        assert owner.__dict__[method] is theirs
        setattr(owner, method, ours)
        megatron_sp_fix.remove()
        assert owner.__dict__[method] is original
    finally:
        setattr(owner, method, original)


def test_rule_11_an_earlier_patch_is_kept_below():
    owner, method = methods()[next(iter(methods()))]
    original = owner.__dict__[method]

    def theirs(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    setattr(owner, method, theirs)
    try:
        megatron_sp_fix.apply()
        assert owner.__dict__[method] is not theirs
        megatron_sp_fix.remove()
        assert owner.__dict__[method] is theirs
    finally:
        setattr(owner, method, original)


def test_applied_nests():
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


def test_an_apply_inside_a_block_stays():
    before = objects()
    with megatron_sp_fix.applied():
        megatron_sp_fix.apply()
    assert objects() != before


def test_applied_is_undone_after_an_exception():
    before = objects()
    with pytest.raises(KeyError), megatron_sp_fix.applied():
        raise KeyError
    assert objects() == before


def test_applied_in_overlapping_threads():
    before = objects()
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with megatron_sp_fix.applied():
            entered.set()
            leave.wait()

    with megatron_sp_fix.applied():
        thread = threading.Thread(target=hold)
        thread.start()
        entered.wait()
    assert objects() != before
    leave.set()
    thread.join()
    assert objects() == before


def test_apply_and_remove_raced():
    before = objects()

    def race():
        for _ in range(30):
            megatron_sp_fix.apply()
            megatron_sp_fix.remove()

    threads = [threading.Thread(target=race) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    megatron_sp_fix.remove()
    assert objects() == before


def test_one_info_line(caplog):
    with caplog.at_level(logging.INFO, "megatron_sp_fix"):
        megatron_sp_fix.apply()
        megatron_sp_fix.apply()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "GPTModel" in caplog.text


def test_signature_name_and_pickle_are_the_originals():
    originals = objects()
    signatures = {name: inspect.signature(method) for name, method in originals.items()}
    with megatron_sp_fix.applied():
        for name, method in objects().items():
            assert inspect.signature(method) == signatures[name]
            assert method.__qualname__ == originals[name].__qualname__
            assert pickle.loads(pickle.dumps(method)) is method
            assert copy.deepcopy(method) is method


def test_wrong_arguments_fail_as_the_original_does():
    owner, method = methods()[next(iter(methods()))]

    class Model:
        pre_process = False

    with megatron_sp_fix.applied(), pytest.raises(TypeError, match="unexpected keyword argument"):
        owner.__dict__[method](Model(), no_such_argument=1)


def test_status_tells_what_is_patched():
    names = [site.name for site in megatron_sp_fix.status().sites]
    assert not any(site.patched for site in megatron_sp_fix.status().sites)
    assert not any(site.by for site in megatron_sp_fix.status().sites)
    replaced = megatron_sp_fix.apply()
    found = megatron_sp_fix.status()
    assert [site.name for site in found.sites] == names
    for site in found.sites:
        ours = any(name.endswith(site.name) for name in replaced)
        assert site.patched == ours
        assert site.by == (("megatron_sp_fix",) if ours else ())
