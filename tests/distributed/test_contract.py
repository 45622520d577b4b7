# SPDX-License-Identifier: Apache-2.0
"""The contract, one test a rule (rule 11 is in tests/unit, rule 12 in benchmarks).

The reference is always a plain LM in the same run; "the same" is `torch.equal`.
"""

import collections
import functools
import threading

import common
import pytest
import torch
from common import STAND_INS, check_same, check_shard, check_tower, fix
from torch.nn.utils import prune

from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron_sp_fix import models, status

SITES = {site.name for site in status().sites}
KINDS = [kind for kind in models.KINDS if models.has(kind)]
TP = [2, 4]
LENGTH = 16


def native(kind):
    name = "Hybrid" if kind == "hybrid" else "GPT"
    return any(site.native == "native" and site.name.startswith(name) for site in status().sites)


# Rule 1: it acts only where the bug is.


def untouched(case):
    config = {"sequence_parallel": False} if case == "no SP" else {}
    plain, tower = models.pair("gpt", config=config)
    data = models.batch(LENGTH)
    calls = []
    tower.embedding.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = models.step(plain, data)
    with fix():
        if case == "decoder_input":
            actual = models.step(tower, data, decoder_input=expected["shard"])
            assert actual["shard"].data_ptr() == expected["shard"].data_ptr() and not calls
        elif case == "no pre_process":
            stage = models.build("gpt", False, pre_process=False)
            stage.set_input_tensor(expected["shard"])
            assert models.forward(stage, data).shape == data["labels"].shape
        elif case == "plain LM":
            check_same(expected, models.step(plain, data))
        else:
            check_same(expected, models.step(tower, data))
            assert len(calls) == 1


def acts():
    _, tower = models.pair("gpt")
    with fix():
        check_shard(models.step(tower, models.batch(LENGTH))["shard"], LENGTH)


@pytest.mark.parametrize(
    ("case", "tp"),
    [("decoder_input", 2), ("no pre_process", 2), ("plain LM", 2), ("no SP", 2), ("TP 1", 1)],
)
def test_rule_1_trigger(run, case, tp):
    run(untouched, case, tp=tp)
    run(acts, tp=2)


# Rule 2: the same numbers as a plain LM.


def same_numbers(kind, position, config, packed, train):
    plain, tower = models.pair(kind, position=position, config=config)
    plain.train(train), tower.train(train)
    data = models.batch(LENGTH, 1 if packed else 2)
    more = {}
    if position == "mrope":
        data["position_ids"] = data["position_ids"].expand(3, -1, -1).contiguous()
    if packed:
        bounds = torch.tensor([0, 5, LENGTH], dtype=torch.int32, device=data["labels"].device)
        more["packed_seq_params"] = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=11,
            max_seqlen_kv=11,
        )
    check_tower(plain, tower, data, LENGTH, **more)


POSITIONS = [
    ("gpt", "rope"),
    ("gpt", "learned_absolute"),
    ("gpt", "none"),
    ("gpt", "mrope"),
    ("gpt", "yarn"),
    ("hybrid", "none"),
    ("hybrid", "rope"),
    ("mtp", "rope"),
    ("mtp", "learned_absolute"),
]


def skip_unbuildable(kind, position):
    if kind not in KINDS:
        pytest.skip("this release needs Transformer Engine for it")
    release = tuple(int(part) for part in status().version.split(".")[:2])
    if position == "yarn" and release < (0, 15):
        pytest.skip("GPTModel has no yarn positions before 0.15")
    if (kind, position, release) == ("hybrid", "rope", (0, 13)):
        pytest.skip("MambaModel 0.13 fails with rope, plain LMs too")


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize(("kind", "position"), POSITIONS)
def test_rule_2_same_numbers(run, kind, position, tp):
    skip_unbuildable(kind, position)
    run(same_numbers, kind, position, {}, False, True, tp=tp)


@pytest.mark.parametrize("position", ["rope", "learned_absolute"])
@pytest.mark.parametrize("kind", models.KINDS)
def test_rule_2_same_dropout(run, kind, position):
    skip_unbuildable(kind, position)
    run(same_numbers, kind, position, {"hidden_dropout": 0.5}, False, True, tp=2)


@pytest.mark.parametrize("tp", TP)
def test_rule_2_packed_sequences(run, tp):
    run(same_numbers, "gpt", "rope", {}, True, True, tp=tp)


def test_rule_2_evaluation(run):
    run(same_numbers, "gpt", "rope", {"hidden_dropout": 0.5}, False, False, tp=2)


def test_rule_2_fp32_residual(run):
    run(same_numbers, "gpt", "rope", {"fp32_residual_connection": True}, False, True, tp=2)


# Rule 3: the decoder's input keeps no more than itself.


def nothing_kept(kind, position, clone):
    config = {"clone_scatter_output_in_embedding": clone}
    _, tower = models.pair(kind, position=position, config=config)
    with fix():
        check_shard(models.step(tower, models.batch(LENGTH))["shard"], LENGTH)


@pytest.mark.parametrize("clone", [True, False])
@pytest.mark.parametrize("position", ["none", "learned_absolute"])
@pytest.mark.parametrize("kind", KINDS)
def test_rule_3_nothing_kept(run, kind, position, clone):
    run(nothing_kept, kind, position, clone, tp=2)


# Rule 4: one collective.


def operations(function):
    """Count the collectives that a call issues, and its clones, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = [event.name for event in profile.events()]
    sent = (name.removeprefix("c10d::").strip("_") for name in names if name.startswith("c10d::"))
    return collections.Counter(sent), names.count("aten::clone")


def one_collective():
    plain, tower = models.pair("gpt", position="none", layers=1)
    data = models.batch(LENGTH)
    common.keep_input_step(plain, tower)
    counted, clones = [], []
    for model in (plain, tower):
        with fix():
            shard = [None]
            forward, copied = operations(lambda: shard.__setitem__(0, models.forward(model, data)))
            backward, _ = operations(lambda: shard[0].sum().backward())
        counted.append((forward, backward))
        clones.append(copied)
    assert counted[0] == counted[1], counted
    # The plain LM also copies what the reduce-scatter made, which is nobody's view.
    assert clones[1] == clones[0] - 1, clones
    assert [sum(c.values()) for c in counted[1]] == [1, 1], counted
    assert "reduce_scatter" in next(iter(counted[1][0])), counted
    assert "allgather" in next(iter(counted[1][1])), counted


def test_rule_4_one_collective(run):
    run(one_collective, tp=2)


# Rule 5: whoever else calls the embedding sees no change.


def unseen(kind):
    _, tower = models.pair(kind)
    data = models.batch(LENGTH)
    ids = {"input_ids": data["input_ids"], "position_ids": data["position_ids"]}
    full = tower.embedding(**ids)
    assert full.shape[0] == LENGTH
    before = common.snapshot(tower)
    seen, main = [], threading.get_ident()

    def meanwhile(*_):
        if threading.get_ident() == main:
            other = threading.Thread(target=lambda: seen.append(tower.embedding(**ids)))
            other.start()
            other.join()

    with fix():
        hook = tower.embedding.embedding_dropout.register_forward_pre_hook(meanwhile)
        out = models.step(tower, data)
        hook.remove()
        assert torch.equal(tower.embedding(**ids), full)

        def fail(*_):
            raise KeyError("inside the embedding")

        hook = tower.embedding.embedding_dropout.register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="inside the embedding"):
            models.forward(tower, data)
        hook.remove()
        assert torch.equal(tower.embedding(**ids), full)
    check_shard(out["shard"], LENGTH)
    assert seen and all(torch.equal(other, full) for other in seen)
    assert torch.equal(tower.embedding(**ids), full)
    common.check_unchanged(before, common.snapshot(tower))


@pytest.mark.parametrize("kind", KINDS)
def test_rule_5_outer_model_sees_no_change(run, kind):
    run(unseen, kind, tp=2)


def hooked(everyone):
    """Hooks run, are given the very modules, and change nothing, whichever ranks have them."""
    plain, tower = models.pair("gpt")
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    modules = [tower.embedding, tower.embedding.word_embeddings]
    seen = collections.Counter()

    def hook(name, module, *_, **__):
        assert module in modules
        module.calls = getattr(module, "calls", 0) + 1
        seen[name] += 1

    if everyone or common.tp_rank() == 0:
        for module in modules:
            module.register_forward_pre_hook(functools.partial(hook, "before"))
            module.register_forward_pre_hook(functools.partial(hook, "kwargs"), with_kwargs=True)
            module.register_forward_hook(functools.partial(hook, "after"))
            module.register_forward_hook(functools.partial(hook, "always"), always_call=True)
            module.register_full_backward_hook(functools.partial(hook, "backward"))
    with fix():
        actual = models.step(tower, data)
    check_same(expected, actual)
    check_shard(actual["shard"], LENGTH)
    # Token ids have no gradient: the backward hook of what takes nothing else does not fire twice.
    for name in ("before", "kwargs", "after", "always"):
        assert seen[name] == (2 if everyone or common.tp_rank() == 0 else 0)
    assert all(getattr(module, "calls", 0) == sum(seen.values()) // 2 for module in modules)


@pytest.mark.parametrize("everyone", [True, False])
def test_rule_5_hooks(run, everyone):
    run(hooked, everyone, tp=2, timeout=60)


def pruned():
    plain, tower = models.pair("gpt")
    for model in (plain, tower):
        words = model.embedding.word_embeddings
        prune.identity(words, "weight")
        with torch.no_grad():
            words.weight_orig += 1
    check_tower(plain, tower, models.batch(LENGTH), LENGTH)


def test_rule_5_a_hook_that_assigns_the_weight(run):
    run(pruned, tp=2)


# Rules 6 and 7: never twice; embeddings of other people's making.


def stand_in(kind, name, sharding):
    plain, tower = models.pair(kind)
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    STAND_INS[name](tower, sharding)
    with fix():
        actual = models.step(tower, data)
    check_same(expected, actual)
    check_shard(actual["shard"], LENGTH)
    if sharding and kind == "gpt" and not native(kind):
        # These releases are right here by themselves: show that the fix acts on the full length.
        stand_in(kind, name, False)


@pytest.mark.parametrize("name", [name for name in STAND_INS if name != "hook"])
@pytest.mark.parametrize("kind", KINDS)
def test_rule_6_never_twice(run, kind, name):
    run(stand_in, kind, name, True, tp=2)


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("kind", KINDS)
def test_rule_7_custom_embeddings(run, kind, name):
    run(stand_in, kind, name, False, tp=2)


def scaled(kind):
    plain, tower = models.pair(kind)
    data = models.batch(LENGTH)
    for model in (plain, tower):
        model.embedding.__class__ = common.Scaled
    check_tower(plain, tower, data, LENGTH)


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("kind", KINDS)
def test_rule_7_scaled_embedding(run, kind, tp):
    run(scaled, kind, tp=tp)


def released():
    """Nothing but the embedding's caller keeps its full-length output alive."""
    import gc
    import weakref

    _, tower = models.pair("gpt", position="none")
    tower.embedding.__class__ = common.Ignoring
    full = []
    shadow = tower.embedding

    def embed(input_ids, position_ids):
        out = shadow(input_ids=input_ids, position_ids=position_ids)
        full.append(weakref.ref(out.untyped_storage()))
        full.append(out.untyped_storage().data_ptr())
        return out

    common.shadow(tower, embed)
    common.keep_input_step(tower)
    with fix():
        out = models.forward(tower, models.batch(LENGTH))
    gc.collect()
    check_shard(out, LENGTH)
    assert out.untyped_storage().data_ptr() != full[1] and full[0]() is None


def test_rule_7_full_length_storage_is_released(run):
    run(released, tp=2)


# Rule 8: padding masks follow.

takes_mask = pytest.mark.skipif(
    "padding_mask" not in models.parameters("gpt"),
    reason="this release's GPTModel takes no padding_mask",
)


MOE = {
    "num_moe_experts": 2,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.1,
    "add_bias_linear": False,
}


def masked(config):
    plain, tower = models.pair("gpt", config=config)
    data = models.batch(LENGTH)
    mask = torch.zeros_like(data["input_ids"], dtype=torch.bool)
    mask[0, 3:] = True
    seen = []
    for model in (plain, tower):
        model.decoder.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["padding_mask"]), with_kwargs=True
        )
    expected = models.step(plain, data, padding_mask=mask)
    with fix():
        actual = models.step(tower, data, padding_mask=mask)
    check_same(expected, actual)
    assert seen[1].shape[1] == LENGTH // common.tp_size() and torch.equal(*seen)
    with fix(), pytest.raises((ValueError, AssertionError), match=r"padding_mask.*shape"):
        models.forward(tower, data, padding_mask=mask[:, :3])


@takes_mask
@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("config", [{}, MOE], ids=["dense", "MoE"])
def test_rule_8_masks_follow(run, tp, config):
    if config and status().version.startswith("0.16."):
        pytest.skip("the MoE router of 0.16 needs Transformer Engine")
    run(masked, config, tp=tp)


# Rule 9: MTP.


def every_depth():
    _, tower = models.pair("mtp")
    data = models.batch(LENGTH)
    inputs = []
    for layer in tower.mtp.layers:
        layer.enorm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    calls = []
    tower.embedding.register_forward_pre_hook(lambda *_: calls.append(1))
    with fix():
        models.step(tower, data)
    assert len(inputs) == 2 and len(calls) == 3
    for shard in inputs:
        check_shard(shard, LENGTH)


@pytest.mark.skipif("mtp" not in KINDS, reason="this release needs Transformer Engine for MTP")
def test_rule_9_mtp_every_depth_once(run):
    run(every_depth, tp=2)


def single_step(sharding):
    plain, tower = models.pair("mtp")
    plain.eval(), tower.eval()
    if sharding:
        STAND_INS["function"](tower, True)
    data = models.batch(8)
    rank, tp = common.tp_rank(), common.tp_size()
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(8, 2, plain.config.hidden_size, generator=generator)
    hidden = hidden.to(data["labels"].device).chunk(tp)[rank]

    def step(model):
        with torch.no_grad():
            return model.mtp.layers[0].forward_single_position(
                hidden_states=hidden,
                next_token_ids=data["input_ids"],
                position_ids=data["position_ids"],
                embedding=model.embedding,
            )

    expected = step(plain)
    with fix():
        actual = step(tower)
    assert expected.shape == hidden.shape
    assert torch.equal(expected, actual)
    if sharding:
        single_step(False)


@pytest.mark.skipif(
    not hasattr(MultiTokenPredictionLayer, "forward_single_position"),
    reason="no speculative step before 0.17",
)
@pytest.mark.skipif("mtp" not in KINDS, reason="this release needs Transformer Engine for MTP")
@pytest.mark.parametrize("sharding", [False, True])
@pytest.mark.parametrize("tp", TP)
def test_rule_9_mtp_single_step(run, tp, sharding):
    run(single_step, sharding, tp=tp)


# Rule 10: clear refusals.


def indivisible(kind):
    _, tower = models.pair(kind)
    for length in (18, 1):
        data = models.batch(length)
        # A rank by itself: a collective would wait for the others for ever.
        if common.tp_rank() == 0:
            with fix(), pytest.raises(ValueError, match=rf"{length}.*{common.tp_size()}.*pad.*to"):
                models.forward(tower, data)


@pytest.mark.parametrize("kind", KINDS)
def test_rule_10_indivisible_length(run, kind):
    run(indivisible, kind, tp=4, timeout=30)


def wrong_length():
    _, tower = models.pair("gpt")
    data = models.batch(LENGTH)
    real = tower.embedding
    common.shadow(tower, lambda input_ids, position_ids: real(input_ids, position_ids)[:5])
    with fix(), pytest.raises(ValueError, match=r"\(5, 2, \d+\).*\(2, 16\).*16.*8"):
        models.forward(tower, data)


def test_rule_10_wrong_length(run):
    run(wrong_length, tp=2)


def sharded_by_a_hook():
    _, tower = models.pair("gpt")
    STAND_INS["hook"](tower, True)
    with fix(), pytest.raises(ValueError, match=r"\(4, 2, \d+\).*hook"):
        models.forward(tower, models.batch(LENGTH))


def test_rule_10_a_hook_that_shards(run):
    run(sharded_by_a_hook, tp=2)


# The same fix whichever group is the model's.


def own_group():
    """TP over ranks {0, 2} and {1, 3}, while the global TP groups are {0, 1} and {2, 3}."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    collection = ProcessGroupCollection.use_mpu_process_groups()
    rank = torch.distributed.get_rank()
    groups = [torch.distributed.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    collection.tp = groups[rank % 2]
    plain, tower = models.pair("gpt", pg_collection=collection, config=SIZES)
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    with fix():
        actual = models.step(tower, data)
        STAND_INS["function"](tower, False)  # which has no group of its own
        wrapped = models.step(tower, data)
    check_same(expected, actual)
    check_same(expected, wrapped)
    assert parallel_state.get_tensor_model_parallel_group() is not collection.tp


SIZES = {"tensor_model_parallel_size": 2}


@pytest.mark.skipif(
    "pg_collection" not in models.parameters("gpt"), reason="this release takes no pg_collection"
)
def test_own_process_group(run):
    run(own_group, ranks=4, tp=2)
