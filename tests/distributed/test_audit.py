# SPDX-License-Identifier: Apache-2.0
"""`audit` on built models: what it says of a tower is what a forward then shows (rule 13)."""

import functools
from unittest import mock

import common
import models
import pytest
import torch
from common import KINDS, RELEASE, SITES, fix, needs_mtp

from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron_sp_fix import NotCoveredError, audit

LENGTH = 16
on_two_ranks = pytest.mark.on_ranks(tp=2, timeout=60)
OWNER, METHOD = common.place()
ROLE = {"hybrid": "hybrid decoder"}


def verdict(model):
    (found,) = audit(model)
    return found.verdict


def rows(tower):
    """How many rows a real forward hands to the decoder."""
    seen = []

    class Enough(BaseException):
        pass

    def stop(_, args, kwargs):
        seen.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).shape[0])
        raise Enough

    hook = tower.decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        models.forward(tower, models.batch(LENGTH))
    except Enough:
        pass
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("kind", KINDS)
@on_two_ranks
def test_a_plain_lm_and_its_tower(kind):
    plain, tower = models.pair(kind)
    native = SITES[ROLE.get(kind, "GPT decoder")].native != "no shard"
    if kind == "mtp":
        native = native and SITES["MTP"].native != "no shard"
    assert verdict(tower) == ("covered" if native else "not covered")
    with fix():
        (found,) = audit(tower, strict=True)
        assert verdict(plain) == "nothing to shard" and "plain LM" in audit(plain)[0].reason
    name = type(tower).__name__
    assert (found.name, found.cls, found.verdict) == ("", name, "covered") and found.covered
    assert ("MTP" in found.reason) == (kind == "mtp")
    if not native:
        with pytest.raises(NotCoveredError, match=rf"model \({name}\): not covered: .* at TP 2"):
            audit(tower, strict=True)


@on_two_ranks
def test_nothing_to_shard():
    tower = models.build("gpt", False, config={"sequence_parallel": False})
    stage = models.build("gpt", False, pre_process=False)
    for model, reason in ((tower, "sequence parallelism is off"), (stage, "does not embed")):
        (found,) = audit(model, strict=True)
        assert found.verdict == "nothing to shard" and reason in found.reason and found.covered


@needs_mtp
@on_two_ranks
def test_mtp_is_judged_by_itself():
    """Its call sites alone are not patched, or are where the decoder's is not."""
    _, tower = models.pair("mtp")
    if SITES["MTP"].native != "no shard":
        pytest.skip("this release shards there by itself")
    roles = [role for role in ("MTP", "hand on", "MTP single step") if role in SITES]
    before = [vars(common.place(role)[0])[common.place(role)[1]] for role in roles]
    with fix():
        after = [vars(common.place(role)[0])[common.place(role)[1]] for role in roles]
        for role, method in zip(roles, before):
            setattr(*common.place(role), method)
        (found,) = audit(tower)
        for role, method in zip(roles, after):
            setattr(*common.place(role), method)
        assert verdict(tower) == "covered"
    assert found.verdict == "not covered"
    assert found.reason == "MTP's first layer gets 8 of 8 rows, not 4, at TP 2"


# What a class of somebody else's does is judged by what arrives, not by how it is written.


def own(method):
    """A subclass of GPTModel with a method of its own at the call site."""
    return type(method.__name__, (GPTModel,), {METHOD: method})


def decorated(method):
    @functools.wraps(method)
    def wrapper(*args, **kwargs):
        return method(*args, **kwargs)

    return wrapper


@own
def by_super(self, *args, **kwargs):
    return getattr(super(type(self), self), METHOD)(*args, **kwargs)


@own
def by_name_of_the_class(self, *args, **kwargs):
    return getattr(GPTModel, METHOD)(self, *args, **kwargs)


@own
@decorated
def by_a_decorator(self, *args, **kwargs):
    return getattr(GPTModel, METHOD)(self, *args, **kwargs)


def original(self, input_ids, position_ids, args, decoder_input, kwargs):
    args = [value for value in args if isinstance(value, torch.Tensor)]
    call = vars(OWNER)[METHOD]
    return call(self, input_ids, position_ids, *args, decoder_input=decoder_input, **kwargs)


@own
def embeds_itself(self, input_ids, position_ids, *args, decoder_input=None, **kwargs):
    embedded = self.embedding(input_ids=input_ids, position_ids=position_ids)
    return original(self, input_ids, position_ids, args, embedded * 2.0, kwargs)


@own
def embeds_and_shards(self, input_ids, position_ids, *args, decoder_input=None, **kwargs):
    embedded = self.embedding(input_ids=input_ids, position_ids=position_ids)
    embedded = embedded.chunk(common.tp_size())[common.tp_rank()]
    return original(self, input_ids, position_ids, args, embedded, kwargs)


class OwnForward(GPTModel):
    def forward(self, input_ids, position_ids, attention_mask, **kwargs):
        return self.decoder(self.embedding(input_ids, position_ids), attention_mask)


class ForwardBySuper(GPTModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class ForwardByClass(GPTModel):
    def forward(self, *args, **kwargs):
        return GPTModel.forward(self, *args, **kwargs)


class HandsIn(GPTModel):
    """Embeds, and hands it to the original as what the outer model gives."""

    def forward(self, input_ids, position_ids, attention_mask, decoder_input=None, **kwargs):
        embedded = self.embedding(input_ids=input_ids, position_ids=position_ids)
        return super().forward(input_ids, position_ids, attention_mask, embedded, **kwargs)


class Chain(HandsIn):
    """Says nothing of what its base does."""

    def forward(self, *args, **kwargs):
        return super(Chain, self).forward(*args, **kwargs)  # noqa: UP008


_space = {"GPTModel": GPTModel}
exec("def forward(self, *args, **kwargs): return GPTModel.forward(self, *args, **kwargs)", _space)

CLASSES = {
    "super": (by_super, "covered"),
    "name of the class": (by_name_of_the_class, "covered"),
    "decorator": (by_a_decorator, "covered"),
    "embeds itself": (embeds_itself, "not covered"),
    "embeds and shards": (embeds_and_shards, "covered"),
    "own forward": (OwnForward, "not covered"),
    "forward by super": (ForwardBySuper, "covered"),
    "forward by class": (ForwardByClass, "covered"),
    "hands in": (HandsIn, "not covered"),
    "chain": (Chain, "not covered"),
    "no source": (type("Made", (GPTModel,), {"forward": _space["forward"]}), "covered"),
}


@pytest.mark.parametrize("name", CLASSES)
@on_two_ranks
def test_agrees_with_a_real_forward(name):
    _, tower = models.pair("gpt", position="none")
    tower.__class__, expected = CLASSES[name]
    with fix():
        (found,) = audit(tower)
        assert (rows(tower) == LENGTH // 2) == (found.verdict == "covered")
        assert found.verdict == expected
        if found.verdict != "covered":
            with pytest.raises(NotCoveredError, match=tower.__class__.__name__):
                audit(tower, strict=True)


@on_two_ranks
def test_agrees_with_a_forward_of_the_instance():
    for cls in (ForwardBySuper, OwnForward, HandsIn):
        _, tower = models.pair("gpt", position="none")
        forward = functools.partial(cls.forward, tower)
        tower.__class__ = cls
        tower.forward = forward
        with fix():
            assert (rows(tower) == LENGTH // 2) == (verdict(tower) == "covered")


# What audit cannot tell, it says.


def fails(self, *args, **kwargs):
    raise ValueError("no such input\nand more")


def gathers(self, input_ids, *args, **kwargs):
    tensor_parallel.gather_from_sequence_parallel_region(input_ids)
    return GPTModel.forward(self, input_ids, *args, **kwargs)


def ends(self, *args, **kwargs):
    return None


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (fails, "ValueError: no such input"),
        (gathers, "for which all ranks are needed"),
        (ends, "ended without"),
    ],
)
@pytest.mark.on_ranks(tp=2, timeout=30)
def test_cannot_tell(forward, reason):
    _, tower = models.pair("gpt")
    tower.__class__ = type("Odd", (GPTModel,), {"forward": forward})
    if common.tp_rank() == 0:  # it hangs where a collective is issued
        with fix():
            (found,) = audit(tower)
        assert found.verdict == "cannot tell" and not found.covered
        assert reason in found.reason and "\n" not in found.reason
        with fix(), pytest.raises(NotCoveredError, match="cannot tell"):
            audit(tower, strict=True)


class Outer(torch.nn.Module):
    def __init__(self, tower):
        super().__init__()
        self.language_model = tower


def containers():
    plain, tower = models.pair("gpt")
    config = tower.config
    outer = Outer(tower)
    flat = DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False)
    yield outer, {"language_model": "covered"}
    yield [outer, plain], {"0.language_model": "covered", "1": "nothing to shard"}
    yield (tower,), {"0": "covered"}
    yield (
        {"student": tower, "teacher": plain},
        {"student": "covered", "teacher": "nothing to shard"},
    )
    yield [{"part": [outer]}], {"0.part.0.language_model": "covered"}
    yield torch.nn.ModuleDict({"a": outer}), {"a.language_model": "covered"}
    yield torch.nn.ModuleList([tower]), {"0": "covered"}
    yield [], {}
    yield torch.nn.Linear(1, 1), {}
    yield DistributedDataParallel(config, flat, tower), {"module": "covered"}
    config.bf16 = True
    yield Float16Module(config, outer), {"module.language_model": "covered"}


@on_two_ranks
def test_wrapped_models_and_containers():
    with fix():
        for model, expected in containers():
            found = {tower.name: tower.verdict for tower in audit(model)}
            assert found == expected
            assert len(found) == len(audit([model, model])), "each is listed once"


@pytest.mark.parametrize(
    "model", [None, "model", [1], {"part": object()}], ids=["None", "str", "list", "dict"]
)
@pytest.mark.on_ranks(tp=1)
def test_what_is_no_model(model):
    with pytest.raises(TypeError, match=r"(?i)torch\.nn\.Module"):
        audit(model)


# It leaves no trace, needs no other rank, and reads no parameter.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.on_ranks(tp=2, timeout=30)
def test_one_rank_alone_and_no_trace(kind):
    plain, tower = models.pair(kind)
    before, random = common.snapshot(tower), torch.get_rng_state()
    if common.tp_rank() == 0:
        with fix():
            assert verdict(tower) == "covered"
            assert verdict(plain) == "nothing to shard"
    assert not common.changes(before, common.snapshot(tower))
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in tower.parameters())
    data = models.batch(LENGTH)
    with fix():
        common.check_same(models.step(plain, data), models.step(tower, data))


@pytest.mark.skipif(RELEASE < (0, 16), reason="offloading of activations is of 0.16")
@on_two_ranks
def test_it_sets_up_no_offloading():
    """A forward begins with that, for the whole step."""
    _, tower = models.pair("gpt")
    tower.config.fine_grained_activation_offloading = True
    name = "preprocess_for_fine_grained_offloading"
    with mock.patch.object(GPTModel, name, autospec=True) as called, fix():
        assert verdict(tower) == "covered" and not called.called
        rows(tower)
        assert called.called


@on_two_ranks
def test_a_model_on_the_meta_device():
    _, tower = models.pair("gpt")
    with fix():
        assert verdict(tower.to("meta")) == "covered"


@on_two_ranks
def test_it_judges_the_call_site_not_a_custom_embedding():
    _, tower = models.pair("gpt")
    common.shadow(tower, lambda input_ids, position_ids: torch.zeros(3, 1, 32))
    with fix():
        assert verdict(tower) == "covered"


@pytest.mark.skipif(RELEASE < (0, 13), reason="position_embedding_type mrope is of 0.13")
@pytest.mark.parametrize("position", ["mrope", "learned_absolute", "none"])
@on_two_ranks
def test_position_embeddings(position):
    _, tower = models.pair("gpt", position=position)
    with fix():
        assert verdict(tower) == "covered"
