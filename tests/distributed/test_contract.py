# SPDX-License-Identifier: Apache-2.0
"""The contract, each test named after its rule (12 and 13 are in tests/unit, 14 in benchmarks).

The reference is a plain LM with the same weights in the same run; "the same" is `torch.equal`.
"""

import collections
import contextlib
import functools
import gc
import inspect
import os
import time
import types
import weakref

import common
import models
import pytest
import torch
from common import (
    KINDS,
    RELEASE,
    SITES,
    STAND_INS,
    check_same,
    check_shard,
    check_tower,
    fix,
    flagless,
    inference,
    needs_mtp,
    runtime_form,
    zeroes_padding,
)
from torch.nn.utils import parametrize, prune

from megatron.core import parallel_state, tensor_parallel
from megatron.core.inference.contexts import BaseInferenceContext, StaticInferenceContext
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

LENGTH = 16
TP = [2, 4]
PATCHED = not os.environ.get("UNPATCHED")
on_two_ranks = pytest.mark.on_ranks(tp=2, timeout=60)
every_kind = pytest.mark.parametrize("kind", KINDS)


# Rule 1: it acts only where the bug is; else the original runs with exactly the caller's arguments.


@contextlib.contextmanager
def recorded(role="GPT decoder"):
    """Note how the original method is called, and what `self.embedding` is meanwhile."""
    owner, method = common.place(role)
    original, calls = owner.__dict__[method], []

    def record(self, *args, **kwargs):
        calls.append((args, kwargs, type(getattr(self, "embedding", None))))
        return original(self, *args, **kwargs)

    with common.instead(owner, **{method: record}):
        yield calls


@pytest.mark.parametrize(
    ("case", "tp"),
    [("decoder_input", 2), ("no pre_process", 2), ("plain LM", 2), ("no SP", 2), ("TP 1", 1)],
)
@pytest.mark.on_ranks
def test_rule_1_does_not_act(case, tp):
    plain, tower = models.pair("gpt", config={"sequence_parallel": False} if "SP" in case else {})
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    embedded = []
    tower.embedding.register_forward_pre_hook(lambda *_: embedded.append(1))
    with recorded() as calls, fix():
        if case == "decoder_input":
            actual = models.step(tower, data, decoder_input=expected["shard"])
            assert actual["shard"].data_ptr() == expected["shard"].data_ptr() and not embedded
        elif case == "no pre_process":
            stage = models.build("gpt", False, pre_process=False)
            stage.set_input_tensor(expected["shard"])
            assert models.forward(stage, data).shape == data["labels"].shape
        else:
            check_same(expected, models.step(plain if case == "plain LM" else tower, data))
    ((args, kwargs, embedding),) = calls
    assert embedding is (type(None) if case == "no pre_process" else LanguageModelEmbedding)
    given = [*args, *kwargs.values()]
    assert any(value is data["input_ids"] for value in given)
    assert any(value is expected["shard"] for value in given) == (case == "decoder_input")


@needs_mtp
@on_two_ranks
def test_rule_1_does_not_act_in_mtp_of_a_plain_lm():
    plain, _ = models.pair("mtp")
    with recorded("MTP") as calls, fix():
        models.step(plain, models.batch(LENGTH))
    assert calls
    for args, kwargs, _ in calls:
        assert any(value is plain.embedding for value in (*args, *kwargs.values()))


@runtime_form
@every_kind
@on_two_ranks
def test_rule_1_acts(kind):
    _, tower = models.pair(kind)
    data = models.batch(LENGTH)
    with recorded("hybrid decoder" if kind == "hybrid" else "GPT decoder") as calls, fix():
        check_shard(models.step(tower, data)["shard"], LENGTH)
    ((args, kwargs, embedding),) = calls
    assert embedding.__name__ == "Sharding"
    assert any(value is data["input_ids"] for value in (*args, *kwargs.values()))


# Rule 2: the same numbers as a plain LM.


def same_numbers(kind, position="rope", config=None, train=True, data=None, **more):
    plain, tower = models.pair(kind, position=position, config=config or {})
    plain.train(train), tower.train(train)
    check_tower(plain, tower, data or models.batch(LENGTH), LENGTH, **more)


POSITIONS = [
    *(("gpt", name) for name in ("rope", "learned_absolute", "none", "mrope", "yarn")),
    *(("hybrid", name) for name in ("none", "rope")),
    *(("mtp", name) for name in ("rope", "learned_absolute")),
]


def skip_unbuildable(kind, position):
    if kind not in KINDS:
        pytest.skip("this release needs Transformer Engine for it")
    if position == "yarn" and RELEASE < (0, 15):
        pytest.skip("GPTModel has no yarn positions before 0.15")
    if (kind, position) == ("hybrid", "rope") and RELEASE < (0, 14):
        pytest.skip("MambaModel fails with rope up to 0.13, plain LMs too")


@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize(("kind", "position"), POSITIONS)
@pytest.mark.on_ranks
def test_rule_2_same_numbers(kind, position, tp):
    skip_unbuildable(kind, position)
    data = models.batch(LENGTH)
    if position == "mrope":
        data["position_ids"] = data["position_ids"].expand(3, -1, -1).contiguous()
    same_numbers(kind, position, data=data)


@pytest.mark.parametrize("position", ["rope", "learned_absolute"])
@every_kind
@on_two_ranks
def test_rule_2_same_dropout(kind, position):
    skip_unbuildable(kind, position)
    same_numbers(kind, position, {"hidden_dropout": 0.5})


@pytest.mark.parametrize("tp", TP)
@pytest.mark.on_ranks
def test_rule_2_packed_sequences(tp):
    data = models.batch(LENGTH, 1)
    same_numbers("gpt", data=data, packed_seq_params=models.packed(5, 11))


@on_two_ranks
def test_rule_2_evaluation():
    same_numbers("gpt", config={"hidden_dropout": 0.5}, train=False)


@on_two_ranks
def test_rule_2_fp32_residual():
    same_numbers("gpt", config={"fp32_residual_connection": True})


GROUPS = {"pg_collection", "model_comm_pgs"} & models.parameters("gpt")  # the latter: 0.14


@pytest.mark.skipif(not GROUPS, reason="a model of this release takes no groups")
@pytest.mark.on_ranks(ranks=4, tp=2)
def test_rule_2_own_process_group():
    """TP over ranks {0, 2} and {1, 3}, while the global TP groups are {0, 1} and {2, 3}."""
    from megatron.core import process_groups_config

    names = "ProcessGroupCollection", "ModelCommProcessGroups"
    cls = next(cls for name in names if (cls := getattr(process_groups_config, name, None)))
    collection = cls.use_mpu_process_groups()
    rank = torch.distributed.get_rank()
    groups = [torch.distributed.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    collection.tp = groups[rank % 2]
    size = {"tensor_model_parallel_size": 2}
    plain, tower = models.pair("gpt", model=dict.fromkeys(GROUPS, collection), config=size)
    data = models.batch(LENGTH)
    check_tower(plain, tower, data, LENGTH)
    if not common.SOURCE:
        STAND_INS["function"](tower, False)  # which has no group of its own
        check_tower(plain, tower, data, LENGTH)
    assert parallel_state.get_tensor_model_parallel_group() is not collection.tp


# Rule 3: the decoder's input owns its own bytes alone, and lives no longer than a plain LM's.


@pytest.mark.parametrize("clone", [True, False])
@pytest.mark.parametrize("position", ["none", "learned_absolute"])
@every_kind
@on_two_ranks
def test_rule_3_owns_its_bytes(kind, position, clone):
    config = {"clone_scatter_output_in_embedding": clone}
    _, tower = models.pair(kind, position=position, config=config)
    with fix():
        check_shard(models.step(tower, models.batch(LENGTH))["shard"], LENGTH, view=not clone)


def given_to_decoder(args, kwargs):
    states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return states._wrapper[0] if hasattr(states, "_wrapper") else states


def lives(model, data, infer):
    """Whether the decoder's input is alive as each layer begins, and in the end."""
    inputs, alive = [], []

    def keep(_, args, kwargs):
        states = given_to_decoder(args, kwargs)
        assert states.shape[0] == LENGTH // common.tp_size()
        inputs.append(weakref.ref(states.untyped_storage()))

    hooks = [model.decoder.register_forward_pre_hook(keep, with_kwargs=True)]
    for layer in model.decoder.layers:
        hooks.append(
            layer.register_forward_pre_hook(lambda *_: alive.append(inputs[0]() is not None))
        )
    more = {}
    if infer:
        more = {"inference_context": StaticInferenceContext(2, LENGTH)}
        more["runtime_gather_output"] = True
        data = {name: data[name] for name in ("input_ids", "position_ids")}
        model.eval()
    with inference() if infer else contextlib.nullcontext(), torch.set_grad_enabled(not infer):
        out = models.forward(model, data, **more)
    for hook in hooks:
        hook.remove()
    gc.collect()
    alive.append(inputs[0]() is not None)
    del out
    return alive


@pytest.mark.parametrize("infer", [False, True])
@every_kind
@on_two_ranks
def test_rule_3_lives_no_longer(kind, infer):
    if infer and RELEASE < (0, 13):
        pytest.skip("no gathered logits under SP in 0.12")
    if infer and kind == "mtp" and RELEASE < (0, 17):
        pytest.skip("MTP needs labels before 0.17")
    plain, tower = models.pair(kind, layers=3)
    data = models.batch(LENGTH)
    expected = lives(plain, data, infer)
    with fix():
        assert lives(tower, data, infer) == expected
    assert len(expected) == 4 and (expected[-1] is False or not infer)


# Rule 4: one collective, which nothing that may differ from rank to rank decides.


def operations(function):
    """Count the collectives that a call issues, and its clones, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = [event.name for event in profile.events()]
    sent = (name.removeprefix("c10d::").strip("_") for name in names if name.startswith("c10d::"))
    return collections.Counter(sent), names.count("aten::clone")


@on_two_ranks
def test_rule_4_one_collective_each_way():
    plain, tower = models.pair("gpt", position="none", layers=1)
    data = models.batch(LENGTH)
    common.keep_input_step(plain, tower)
    counted, clones = [], []
    for model in (plain, tower):
        with fix():
            shard = []
            forward, copied = operations(lambda: shard.append(models.forward(model, data)))
            backward, _ = operations(lambda: shard[0].sum().backward())
        counted.append((forward, backward))
        clones.append(copied)
    assert counted[0] == counted[1]
    # Both plain LM and source form copy what the reduce-scatter made, which is nobody's view.
    by_source = SITES["GPT decoder"].native == "this fix"
    assert clones[1] == clones[0] - (not by_source)
    assert [sum(count.values()) for count in counted[1]] == [1, 1], counted
    assert "reduce_scatter" in next(iter(counted[1][0])), counted
    assert "allgather" in next(iter(counted[1][1])), counted


@pytest.mark.parametrize("position", ["rope", "learned_absolute"])
@every_kind
@on_two_ranks
def test_rule_4_no_collective_more_than_a_plain_lm(kind, position):
    skip_unbuildable(kind, position)
    plain, tower = models.pair(kind, position=position)
    data = models.batch(LENGTH)
    with fix():
        counted = [operations(lambda: models.step(model, data))[0] for model in (plain, tower)]
    assert counted[0] == counted[1]


def timed(module):
    """What somebody looking for the slow rank does, to one object."""
    forward, module.seconds = module.forward, 0.0

    @functools.wraps(forward)
    def timer(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return forward(*args, **kwargs)
        finally:
            module.seconds += time.perf_counter() - begin

    module.forward = timer


ON_ONE_RANK = {
    "forward": lambda model: timed(model.embedding),
    "word embeddings' forward": lambda model: timed(model.embedding.word_embeddings),
    "dropout's forward": lambda model: timed(model.embedding.embedding_dropout),
    "hook": lambda model: model.embedding.register_forward_hook(lambda *_: None),
    "word embeddings' hook": lambda model: (
        model.embedding.word_embeddings.register_forward_pre_hook(lambda *_: None)
    ),
    "attribute": lambda model: setattr(model.embedding, "calls", 0),
    "backward hook": lambda model: model.embedding.word_embeddings.register_full_backward_hook(
        lambda *_: None
    ),
}


@pytest.mark.parametrize("name", ON_ONE_RANK)
@pytest.mark.parametrize("position", ["rope", "learned_absolute"])
@pytest.mark.on_ranks(tp=2, timeout=30)
def test_rule_4_one_rank_differs(position, name):
    plain, tower = models.pair("gpt", position=position)
    data = models.batch(LENGTH)
    expected, counted = models.step(plain, data), operations(lambda: models.step(plain, data))[0]
    if common.tp_rank() == 0:
        ON_ONE_RANK[name](tower)
    with fix():
        actual = {}
        assert operations(lambda: models.step(tower, data, out=actual))[0] == counted
    check_same(expected, actual)


# Rule 5: whoever else calls the embedding, before or after, sees no change.


def fail(*_):
    raise KeyError("inside")


FAILING = {
    "nothing": lambda model: None,
    "word embeddings": lambda model: model.embedding.word_embeddings,
    "dropout": lambda model: model.embedding.embedding_dropout,
    "decoder": lambda model: model.decoder,
    "layer": lambda model: model.decoder.layers[1],
    "output layer": lambda model: model.output_layer,
}


@pytest.mark.parametrize("where", FAILING)
@every_kind
@on_two_ranks
def test_rule_5_outer_model_sees_no_change(kind, where):
    plain, tower = models.pair(kind)
    data = models.batch(LENGTH)
    ids = {"input_ids": data["input_ids"], "position_ids": data["position_ids"]}
    full = tower.embedding(**ids)
    assert full.shape[0] == LENGTH
    changed = []
    with fix():
        for model in (plain, tower):
            module = FAILING[where](model)
            hook = module.register_forward_pre_hook(fail) if module else None
            before = common.snapshot(model)
            if module:
                with pytest.raises(KeyError, match="inside"):
                    models.forward(model, data)
            else:
                out = models.step(model, data)
            changed.append(common.changes(before, common.snapshot(model)))
            if hook:
                hook.remove()
                out = models.step(model, data)
        assert torch.equal(tower.embedding(**ids), full)
    assert changed[0] == changed[1]
    assert not any(
        "embedding" in name or attribute == "embedding" for name, attribute in changed[1]
    )
    assert torch.equal(tower.embedding(**ids), full)
    check_shard(out["shard"], LENGTH)


@every_kind
@on_two_ranks
def test_rule_5_an_embedding_assigned_in_the_call_stays(kind):
    _, tower = models.pair(kind)
    real, mine = tower.embedding, common.Wrapper(tower.embedding, True)
    mine.scatter_to_sequence_parallel = True  # which 0.19 asks after the call

    def assign(*_):
        common.shadow(tower, mine)

    with fix():
        hook = real.register_forward_pre_hook(assign)
        check_shard(models.step(tower, models.batch(LENGTH))["shard"], LENGTH)
        hook.remove()
        assert tower.embedding is mine
        assert models.step(tower, models.batch(LENGTH))["shard"].shape[0] == LENGTH // 2
        assert tower.embedding is mine
    del tower.__dict__["embedding"]
    assert tower.embedding is real


@every_kind
@on_two_ranks
def test_rule_5_an_embedding_assigned_to_itself_in_the_call(kind):
    plain, tower = models.pair(kind, position="none")
    data = models.batch(LENGTH)

    def assign(*_):
        embedding, tower.embedding = tower.embedding, None
        tower.embedding = embedding

    hook = tower.decoder.register_forward_pre_hook(assign)
    with fix():
        for _ in range(2):
            check_same(models.step(plain, data), models.step(tower, data))
        hook.remove()
        # Still an embedding of megatron-core's, whose collectives are a plain LM's.
        counted = [operations(lambda: models.step(model, data))[0] for model in (plain, tower)]
    assert counted[0] == counted[1]


# Rules 6 and 7: never twice; embeddings of other people's making keep what they compute.


def stand_in(kind, name, sharding):
    plain, tower = models.pair(kind)
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    STAND_INS[name](tower, sharding)
    with fix():
        actual = models.step(tower, data)
    check_same(expected, actual)
    check_shard(actual["shard"], LENGTH, view=sharding)


@pytest.mark.parametrize("name", [n for n in STAND_INS if n not in ("hook", "instance forward")])
@every_kind
@on_two_ranks
def test_rule_6_never_twice(kind, name):
    stand_in(kind, name, True)
    # Right by itself before 0.19: show that the fix acts on the full length.
    if kind == "gpt" and not (common.SOURCE and name in ("wrapper", "function")):
        stand_in(kind, name, False)


def marked(names):
    """What has no flag, or a signature of its own, is left to the runtime form."""
    marks = {"wrapper": flagless, "function": flagless, "instance forward": runtime_form}
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


@pytest.mark.parametrize("name", marked(STAND_INS))
@every_kind
@on_two_ranks
def test_rule_7_custom_embeddings(kind, name):
    stand_in(kind, name, False)


@pytest.mark.parametrize("tp", TP)
@every_kind
@pytest.mark.on_ranks
def test_rule_7_scaled_embedding(kind, tp):
    plain, tower = models.pair(kind)
    for model in (plain, tower):
        model.embedding.__class__ = common.Scaled
    check_tower(plain, tower, models.batch(LENGTH), LENGTH)


def whole(self, input_ids, position_ids, tokentype_ids=None):
    """As one that knows no flags: whole sequences, always."""
    return common.Ignoring.forward(self, input_ids, position_ids, tokentype_ids)


def reduced(self, input_):
    """A word embedding that all-reduces, always."""
    outside = (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index)
    rows = (input_ - self.vocab_start_index).masked_fill(outside, 0)
    rows = torch.nn.functional.embedding(rows, self.weight).masked_fill(outside[..., None], 0.0)
    return tensor_parallel.reduce_from_tensor_model_parallel_region(rows)


def around(original):
    """A decorator's wrapper, which copies the name and the module of what it calls."""

    @functools.wraps(original)
    def wrapper(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    return wrapper


CLASS_WIDE = {
    "embedding": (LanguageModelEmbedding, whole),
    "words": (VocabParallelEmbedding, reduced),
    "decorated embedding": (LanguageModelEmbedding, around(LanguageModelEmbedding.forward)),
    "decorated words": (VocabParallelEmbedding, around(VocabParallelEmbedding.forward)),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CLASS_WIDE)
@every_kind
@on_two_ranks
def test_rule_7_replaced_for_the_class(kind, name, when):
    plain, tower = models.pair(kind)
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    cls, forward = CLASS_WIDE[name]
    with contextlib.ExitStack() as stack:
        for context in (common.instead(cls, forward=forward), fix())[
            :: 1 if when == "before" else -1
        ]:
            stack.enter_context(context)
        actual = models.step(tower, data)
    check_same(expected, actual)
    check_shard(actual["shard"], LENGTH)


class Prompted(torch.nn.Module):
    """Puts rows of its own before those of the ids, as soft prompts are."""

    def __init__(self, real, scatters):
        super().__init__()
        self.real, self.scatter_to_sequence_parallel = real, scatters
        start = torch.linspace(-1, 1, 4 * real.config.hidden_size)
        start = start.view(4, 1, -1).to(real.word_embeddings.weight)
        self.prompt = torch.nn.Parameter(start)

    def forward(self, input_ids, position_ids):
        full = common.full_length(self.real.word_embeddings, input_ids).transpose(0, 1)
        full = torch.cat([self.prompt.expand(-1, full.shape[1], -1), full])
        if self.scatter_to_sequence_parallel:
            return tensor_parallel.scatter_to_sequence_parallel_region(full).clone()
        return full


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mtp"])
@on_two_ranks
def test_rule_7_more_rows_than_ids(kind):
    plain, tower = models.pair(kind)
    data = models.batch(LENGTH)
    data["labels"] = torch.cat([data["labels"][:, :4], data["labels"]], 1)
    for model, scatters in ((plain, True), (tower, False)):
        model.embedding = Prompted(model.embedding, scatters)
    check_tower(plain, tower, data, LENGTH + 4)


@needs_mtp
@pytest.mark.on_ranks(tp=2, cp=2)
def test_rule_7_mtp_embedding_that_returns_its_own_part():
    """A job's own stand-in that takes whole ids, and gives context and sequence parallel rows."""
    if RELEASE < (0, 14):
        pytest.skip("MTP takes no context parallelism before 0.14")
    if torch.distributed.get_backend() == "gloo":
        torch.cuda.Stream = lambda: None  # which attention hands to its core
    results, data = [], models.batch(2 * LENGTH)
    rank, part = parallel_state.get_context_parallel_rank(), LENGTH // 2
    rows = torch.cat([torch.arange(part * at, part * (at + 1)) for at in (rank, 3 - rank)])
    labels = data["labels"][:, rows].contiguous()
    for context in (contextlib.nullcontext, fix):
        _, model = models.pair("mtp", position="none")
        real = model.embedding

        def embed(input_ids, position_ids, real=real):
            full = real(input_ids=input_ids, position_ids=position_ids)[rows].contiguous()
            return tensor_parallel.scatter_to_sequence_parallel_region(full)

        embed.word_embeddings = real.word_embeddings
        inputs = []
        for layer in model.mtp.layers:
            layer.enorm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        given = embed(data["input_ids"], data["position_ids"]).detach()
        common.shadow(model, embed)
        with context():
            results.append(models.step(model, {**data, "labels": labels}, decoder_input=given))
        assert [states.shape[0] for states in inputs] == [LENGTH // 2] * 2
    check_same(*results)


@flagless
@on_two_ranks
def test_rule_7_full_length_storage_is_released():
    _, tower = models.pair("gpt", position="none")
    tower.embedding.__class__ = common.Ignoring
    real, full = tower.embedding, []

    def embed(input_ids, position_ids):
        out = real(input_ids=input_ids, position_ids=position_ids)
        full.append(weakref.ref(out.untyped_storage()))
        return out

    common.shadow(tower, embed)
    common.keep_input_step(tower)
    with fix():
        out = models.forward(tower, models.batch(LENGTH))
    gc.collect()
    check_shard(out, LENGTH)
    assert full[0]() is None


@runtime_form
@on_two_ranks
def test_rule_7_a_view_is_copied():
    """A custom embedding that shards by a slice: right numbers, but the whole stays alive."""
    plain, tower = models.pair("gpt")
    real = tower.embedding

    def embed(input_ids, position_ids):
        full = real(input_ids=input_ids, position_ids=position_ids)
        return tensor_parallel.scatter_to_sequence_parallel_region(full)[:]

    common.shadow(tower, embed)
    check_tower(plain, tower, models.batch(LENGTH), LENGTH)


@on_two_ranks
def test_rule_7_a_subclass_inside_megatron_core():
    """A fork's own embedding is not the stock one, though its module is megatron-core's."""

    class Numbered(LanguageModelEmbedding):
        def forward(self, input_ids, position_ids):
            out = super().forward(input_ids, position_ids)
            return out + torch.arange(out.shape[0]).to(out)[:, None, None]

    own = Numbered.forward
    there = {**own.__globals__, "__name__": "megatron.core.models.fork.embedding"}
    Numbered.forward = types.FunctionType(own.__code__, there, closure=own.__closure__)
    _, tower = models.pair("gpt", position="none")
    tower.embedding.__class__ = Numbered
    common.keep_input_step(tower)
    data = models.batch(LENGTH)
    full = tower.embedding(data["input_ids"], data["position_ids"])
    with fix():
        actual = models.forward(tower, data)
    assert torch.equal(actual, tensor_parallel.scatter_to_sequence_parallel_region(full))


# Rule 8: what works without the fix works with it (test_property.py); such as code that is handed
# the embedding and does more with it than call it by keywords.


def by_position(embedding, ids, positions):
    return embedding(ids, positions)


def by_forward(embedding, ids, positions):
    return embedding.forward(input_ids=ids, position_ids=positions)


def with_types(embedding, ids, positions):
    return embedding(ids, positions, None)


def with_types_by_name(embedding, ids, positions):
    return embedding(ids, position_ids=positions, tokentype_ids=None)


def reads_attributes(embedding, ids, positions):
    assert isinstance(embedding, (torch.nn.Module, LanguageModelEmbedding))
    assert embedding.word_embeddings.weight.dtype is embedding.config.params_dtype
    assert "word_embeddings.weight" in dict(embedding.named_parameters())
    assert embedding.training and not hasattr(embedding, "no_such_attribute")
    return embedding(input_ids=ids, position_ids=positions)


def sets_attributes(embedding, ids, positions):
    embedding.calls = getattr(embedding, "calls", 0) + 1
    return embedding(input_ids=ids, position_ids=positions)


def shards_unless_it_does(embedding, ids, positions):
    out = embedding(input_ids=ids, position_ids=positions)
    if embedding.scatter_to_sequence_parallel:
        return out
    return tensor_parallel.scatter_to_sequence_parallel_region(out).clone()


USES = {
    use.__name__: use
    for use in (
        by_position,
        by_forward,
        with_types,
        with_types_by_name,
        reads_attributes,
        sets_attributes,
        shards_unless_it_does,
    )
}


@contextlib.contextmanager
def embeds_by(use, role):
    """Replace a method for the class by one that embeds by itself, then calls the original."""
    owner, method = common.place(role)
    original = owner.__dict__[method]
    signature = inspect.signature(original)

    def replaced(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs).arguments
        if bound.get("decoder_input") is None:
            bound["decoder_input"] = use(self.embedding, bound["input_ids"], bound["position_ids"])
        return original(**bound)

    with common.instead(owner, **{method: replaced}):
        yield


@runtime_form
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mtp"])
@on_two_ranks
def test_rule_8_code_that_uses_the_embedding(kind, use):
    plain, tower = models.pair(kind)
    with embeds_by(USES[use], "hybrid decoder" if kind == "hybrid" else "GPT decoder"):
        check_tower(plain, tower, models.batch(LENGTH), LENGTH)
    assert getattr(tower.embedding, "calls", 0) == (use == "sets_attributes")


def by_name(original):
    """Passes every argument on by its name, `self` too."""
    signature = inspect.signature(original)

    def replaced(*args, **kwargs):
        return original(**signature.bind(*args, **kwargs).arguments)

    return replaced


def twice(original):
    def replaced(self, *args, **kwargs):
        original(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return replaced


@pytest.mark.parametrize("patch", [by_name, twice])
@on_two_ranks
def test_rule_8_patches_of_others(patch):
    """One that was made before, or one after."""
    if patch is twice and RELEASE < (0, 19):
        pytest.skip("before 0.19 nobody shards what embeds once more, with the fix or without")
    plain, tower = models.pair("gpt")
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    owner, method = common.place()

    def theirs():
        return common.instead(owner, **{method: patch(owner.__dict__[method])})

    first, second = (theirs, fix) if patch is twice else (fix, theirs)
    with first(), second():
        check_same(expected, models.step(tower, data))


@pytest.mark.skipif("hybrid" not in KINDS, reason="this release needs Transformer Engine for it")
@on_two_ranks
def test_rule_8_an_embedding_wrapped_during_a_forward():
    """What the wrapper then holds stands for the embedding, once that forward is over."""
    plain, tower = models.pair("hybrid")
    data = models.batch(LENGTH)
    expected = models.step(plain, data)

    def wrap(*_):
        hook.remove()
        common.shadow(tower, common.Proxy(tower.embedding, False))

    hook = tower.decoder.register_forward_pre_hook(wrap)
    with fix():
        for _ in range(2):
            check_same(expected, models.step(tower, data))


@on_two_ranks
def test_rule_8_ids_of_three_dimensions():
    """Several tokens a position, as audio codecs have them, whose embeddings are added."""

    class Codebooks(torch.nn.Module):
        def __init__(self, words):
            super().__init__()
            self.words = words

        def forward(self, ids):
            return sum(self.words(part) for part in ids.unbind(-1))

    plain, tower = models.pair("gpt")
    plain.embedding.reduce_scatter_embeddings = False  # the module returns full length
    plain.embedding.word_embeddings.reduce_scatter_embeddings = False
    for model in (plain, tower):
        model.embedding.word_embeddings = Codebooks(model.embedding.word_embeddings)
    data = models.batch(LENGTH)
    data["input_ids"] = torch.stack([data["input_ids"], data["labels"]], -1)
    check_tower(plain, tower, data, LENGTH)


@runtime_form
@on_two_ranks
def test_rule_8_token_types():
    plain, tower = models.pair("gpt", position="learned_absolute")
    for model in (plain, tower):
        torch.manual_seed(5)
        real = model.embedding
        model.embedding = LanguageModelEmbedding(
            model.config,
            models.VOCAB,
            128,
            "learned_absolute",
            num_tokentypes=2,
            scatter_to_sequence_parallel=real.scatter_to_sequence_parallel,
        ).to(data_device())
        model.embedding.load_state_dict({**model.embedding.state_dict(), **real.state_dict()})

    def use(embedding, ids, positions):
        return embedding(ids, positions, tokentype_ids=ids % 2)

    with embeds_by(use, "GPT decoder"):
        check_tower(plain, tower, models.batch(LENGTH), LENGTH)


def data_device():
    return torch.cuda.current_device()


# What the design gives up: code inside of a stock embedding's call sees what a plain LM's sees.
# Wherever the length shows it, an error says so, on every rank.


def added(module, args, out):
    return torch.cat([out, out[:2]])


def from_words(model):
    """A forward of the instance that makes the whole sequence from the word embeddings' rows."""
    words = model.embedding.word_embeddings

    def forward(input_ids, position_ids):
        return words(input_ids).transpose(0, 1).contiguous()

    model.embedding.forward = forward


GIVEN_UP = {
    "a hook that shards": lambda model: STAND_INS["hook"](model, True),
    "an instance's forward that shards": lambda model: STAND_INS["instance forward"](model, True),
    "a hook that adds rows": lambda model: model.embedding.register_forward_hook(added),
    "an instance's forward that calls the words": from_words,
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=runtime_form if "instance's" in n else ()) for n in GIVEN_UP]
)
@pytest.mark.on_ranks(tp=2, timeout=30)
def test_given_up_is_said_on_every_rank(name):
    _, tower = models.pair("gpt", position="none")
    GIVEN_UP[name](tower)
    with fix(), pytest.raises(ValueError, match=rf"\d+ rows of {LENGTH} tokens, not 8.*size 2"):
        models.forward(tower, models.batch(LENGTH, 3))


# Rule 9: everything around it works as in a plain LM.


EVENTS = {
    "forward_pre": {},
    "forward_pre with kwargs": {"with_kwargs": True},
    "forward": {},
    "forward with kwargs": {"with_kwargs": True},
    "forward always": {"always_call": True},
    "forward prepended": {"prepend": True},
    "full_backward": {},
    "full_backward_pre": {},
    "backward": {},  # the legacy kind
}


def registered(model, event, seen, everywhere):
    """Register one kind of hook on each module of the embedding, or for all modules at once."""
    names = {id(module): name for name, module in model.named_modules()}

    def hook(module, *given):
        # Gradients of what a hook is given, or rows: a plain LM's, too.
        values = given[-1] if isinstance(given[-1], tuple) else given[-1:]
        shapes = [tuple(value.shape) for value in values if isinstance(value, torch.Tensor)]
        seen.append((names[id(module)], shapes))

    kind = event.split()[0]
    if everywhere:
        register = getattr(torch.nn.modules.module, f"register_module_{kind}_hook")
        return [register(hook, **({"always_call": True} if "always" in event else {}))]
    embedding = model.embedding
    modules = (embedding, embedding.word_embeddings, embedding.embedding_dropout)
    return [getattr(m, f"register_{kind}_hook")(hook, **EVENTS[event]) for m in modules]


def with_hooks(model, data, event, everywhere):
    seen = []
    hooks = registered(model, event, seen, everywhere)
    try:
        return models.step(model, data), seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("event", EVENTS)
@every_kind
@on_two_ranks
def test_rule_9_hooks(kind, event):
    plain, tower = models.pair(kind)
    data = models.batch(LENGTH)
    expected, before = with_hooks(plain, data, event, False)
    with fix():
        actual, seen = with_hooks(tower, data, event, False)
    check_same(expected, actual)
    if event == "backward":  # they fire with the output's gradient, which two modules may share
        seen.sort(), before.sort()
    assert seen == before and len(seen) >= 2


@pytest.mark.parametrize(
    "event", ["forward_pre", "forward", "forward always", "full_backward", "full_backward_pre"]
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mtp"])
@on_two_ranks
def test_rule_9_global_hooks(kind, event):
    plain, tower = models.pair(kind)
    data = models.batch(LENGTH)
    del data["labels"]  # the loss overwrites logits, which a global backward hook made a view
    expected, before = with_hooks(plain, data, event, True)
    with fix():
        actual, seen = with_hooks(tower, data, event, True)
    check_same(expected, actual)
    assert seen == before and len(seen) > 10


def prunes(model):
    """A pre-hook assigns the weight before each call."""
    words = model.embedding.word_embeddings
    prune.identity(words, "weight")
    with torch.no_grad():
        words.weight_orig += 1


def swaps_a_child(model):
    def swap(module, args):
        module.embedding_dropout = torch.nn.Identity()

    model.embedding.register_forward_pre_hook(swap)


def changes_a_child(model):
    def change(module, args):
        module.embedding_dropout.p = 0.0

    model.embedding.register_forward_pre_hook(change)


def scales_the_output(model):
    model.embedding.register_forward_hook(lambda module, args, out: out * 2.0)


def detaches_the_output(model):
    model.embedding.word_embeddings.register_forward_hook(lambda module, args, out: out.detach())


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return weight * 2.0


def parametrizes(model):
    parametrize.register_parametrization(model.embedding.word_embeddings, "weight", Doubled())


def freezes(model):
    model.embedding.requires_grad_(False)


AROUND = {
    change.__name__: change
    for change in (
        prunes,
        swaps_a_child,
        changes_a_child,
        scales_the_output,
        detaches_the_output,
        parametrizes,
        freezes,
    )
}


@pytest.mark.parametrize("change", AROUND)
@every_kind
@on_two_ranks
def test_rule_9_changes_of_the_embedding(kind, change):
    plain, tower = models.pair(kind, config={"hidden_dropout": 0.5})
    for model in (plain, tower):
        AROUND[change](model)
    check_tower(plain, tower, models.batch(LENGTH), LENGTH)


@pytest.mark.parametrize(
    "config",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        {"recompute_granularity": "selective"},
    ],
    ids=["full uniform", "full block", "selective"],
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hybrid"])
@on_two_ranks
def test_rule_9_recomputation(kind, config):
    config = {**config, "hidden_dropout": 0.5}
    with common.random_state():
        try:
            models.step(models.build(kind, True, config=config), models.batch(LENGTH))
        except (NameError, TypeError) as error:
            pytest.skip(f"MTP of this release fails, plain LMs too: {error}")
        same_numbers(kind, config=config)


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


@takes_mask
@pytest.mark.parametrize("tp", TP)
@pytest.mark.parametrize("config", [{}, MOE], ids=["dense", "MoE"])
@pytest.mark.on_ranks
def test_rule_9_masks_follow(tp, config):
    if config and RELEASE == (0, 16):
        pytest.skip("the MoE router of 0.16 needs Transformer Engine")
    plain, tower = models.pair("gpt", config=config)
    data = models.batch(LENGTH)
    mask = torch.zeros_like(data["input_ids"], dtype=torch.bool)
    mask[0, 3:] = True
    seen = []
    for model in (plain, tower):
        model.decoder.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["padding_mask"]), with_kwargs=True
        )
    check_tower(plain, tower, data, LENGTH, padding_mask=mask)
    assert seen[1].shape[1] == LENGTH // tp and torch.equal(*seen)


class Batch(BaseInferenceContext):
    """What a model reads of a dynamic batch of which some rows are padding."""

    active_token_count, padding_slice = 5, slice(5, LENGTH)
    use_flashinfer_fused_rope, num_speculative_tokens = False, 0

    def __init__(self):
        # The base class's own arguments differ between releases, and nothing here reads them.
        pass

    def is_static_batching(self):
        return False


class Reached(Exception):
    """The decoder was called; what came after it is not of interest."""


@zeroes_padding
@pytest.mark.parametrize("name", ["inference_context", "inference_params", "by position"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mtp"])
@on_two_ranks
def test_rule_9_padding_rows_by_either_name(kind, name):
    _, tower = models.pair(kind, position="none")
    data = models.batch(LENGTH, 1)
    full = tower.embedding(data["input_ids"], data["position_ids"]).detach()
    full[5:] = 0.0
    given = []

    def stop(_, args, kwargs):
        given.append(given_to_decoder(args, kwargs))
        raise Reached

    tower.decoder.register_forward_pre_hook(stop, with_kwargs=True)
    tower.eval()
    tower.config.fp8 = "e4m3"
    args, kwargs = [data["input_ids"], data["position_ids"], None], {name: Batch()}
    if name == "by position":
        at = list(inspect.signature(tower.forward).parameters).index("inference_context")
        args, kwargs = [*args, *[None] * (at - 3), Batch()], {}
    if RELEASE > (0, 12):
        kwargs["runtime_gather_output"] = True
    with fix(), torch.no_grad(), inference(), pytest.raises(Reached):
        tower(*args, **kwargs)
    check_shard(given[0], LENGTH)
    assert torch.equal(given[0], full.chunk(2)[common.tp_rank()])


def compiles_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


def compiles_fullgraph(model):
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)


def compiles_module(model):
    model.compile(backend="aot_eager")


def compiles_embedding(model):
    model.embedding.compile(backend="eager", fullgraph=True)


def compiles_words(model):
    model.embedding.word_embeddings.compile(backend="aot_eager")


def wraps_embedding(model):
    model.embedding = torch.compile(model.embedding, backend="eager")


COMPILED = {
    how.__name__: how
    for how in (
        compiles_forward,
        compiles_fullgraph,
        compiles_module,
        compiles_embedding,
        compiles_words,
        wraps_embedding,
    )
}
#: Where torch.compile hangs on a GPU, in plain LMs too: megatron-core sets the random state under a
#: lock of torch.cuda's, and what is compiled there takes the same lock once more.
HANGS = ("compiles_forward", "compiles_module", "wraps_embedding")


def skip_if_it_hangs(how):
    if torch.distributed.get_backend() == "nccl" and how in HANGS:
        pytest.skip("torch.compile hangs on GPUs, in plain LMs too")


@contextlib.contextmanager
def traceable():
    """Let torch.compile trace what says which device this rank has: a plain function of ours."""
    device = torch.cuda.current_device()

    def current_device():
        return device

    torch._dynamo.reset()
    torch.compile(lambda: torch.cuda.current_device, backend="eager")()  # knows its own by now
    with common.instead(torch.cuda, current_device=current_device):
        yield


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.on_ranks(tp=2, timeout=240)
def test_rule_9_torch_compile(how):
    if common.SOURCE and RELEASE == (0, 13) and how == "compiles_fullgraph":
        pytest.skip("a model of 0.13 has no group to pass, of which megatron-core warns")
    skip_if_it_hangs(how)
    plain, tower = models.pair("gpt", layers=1, position="none")
    common.keep_input_step(plain, tower)
    data = models.batch(LENGTH)
    with traceable():
        COMPILED[how](plain)
        try:
            expected = models.step(plain, data)
        except torch._dynamo.exc.TorchDynamoException as error:
            pytest.skip(f"the plain LM does not compile: {error}")
        with fix():
            COMPILED[how](tower)  # what is compiled before apply() is of that time
            for _ in range(2):
                actual = models.step(tower, data)
                assert not models.differences(expected, actual)
    check_shard(actual["shard"], LENGTH)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mtp"])
@pytest.mark.on_ranks(tp=2, timeout=240)
def test_rule_9_torch_compile_where_a_hook_breaks_the_graph(kind):
    """What is compiled for a plain LM may be used for a tower, and must not bypass the fix."""
    skip_if_it_hangs("compiles_module")
    plain, tower = models.pair(kind, layers=1, position="none")
    common.keep_input_step(plain, tower)
    data = models.batch(LENGTH)
    with traceable():
        results = []
        for model in (plain, tower):
            with fix():
                model.embedding.register_forward_hook(lambda *_: torch._dynamo.graph_break())
                compiles_module(model)
                results.append(models.step(model, data))
    assert not models.differences(*results)
    check_shard(results[1]["shard"], LENGTH)


@pytest.mark.parametrize("what", ["embedding", "words", "model"])
@pytest.mark.on_ranks(tp=2, ranks=4)
def test_rule_9_fsdp2(what):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    mesh = DeviceMesh.from_group(parallel_state.get_data_parallel_group(), device)
    plain, tower = models.pair("gpt", layers=1)
    results = []
    for model in (plain, tower):
        if what == "words":
            fully_shard(model.embedding.word_embeddings, mesh=mesh)
        elif what == "embedding":
            fully_shard(model.embedding, mesh=mesh)
        else:
            fully_shard(model.embedding, mesh=mesh)
            fully_shard(model, mesh=mesh)
        with fix():
            out = models.step(model, models.batch(LENGTH, seed=torch.distributed.get_rank() // 2))
        local = {name: getattr(value, "_local_tensor", value) for name, value in out.items()}
        results.append(local)
    check_same(*results)
    check_shard(results[1]["shard"], LENGTH)


@on_two_ranks
def test_rule_9_modelopt_quantizers():
    quantization = pytest.importorskip("modelopt.torch.quantization", exc_type=ImportError)
    if RELEASE < (0, 13):
        pytest.skip("ModelOpt does not know the layers of 0.12")
    results, data = [], models.batch(LENGTH)
    with fix():
        for model in models.pair("gpt"):
            quantization.quantize(
                model,
                quantization.INT8_DEFAULT_CFG,
                lambda quantized: models.forward(quantized, data),
            )
            amax = {name: value for name, value in model.named_buffers() if "amax" in name}
            results.append({**models.step(model, data), **amax})
            assert amax
    check_same(*results)
    check_shard(results[1]["shard"], LENGTH)


# Rule 10: each depth of MTP embeds a shard, once.


def inputs_of_mtp(model):
    inputs = []
    for layer in model.mtp.layers:
        layer.enorm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    return inputs


@needs_mtp
@on_two_ranks
def test_rule_10_every_depth_once():
    _, tower = models.pair("mtp")
    inputs, calls = inputs_of_mtp(tower), []
    tower.embedding.register_forward_pre_hook(lambda *_: calls.append(1))
    with fix():
        models.step(tower, models.batch(LENGTH))
    assert len(inputs) == 2 and len(calls) == 3
    for shard in inputs:
        check_shard(shard, LENGTH)


def speculative(model, hidden, data):
    with torch.no_grad():
        return model.mtp.layers[0].forward_single_position(
            hidden_states=hidden,
            next_token_ids=data["input_ids"],
            position_ids=data["position_ids"],
            embedding=model.embedding,
        )


speculates = pytest.mark.skipif(
    not hasattr(MultiTokenPredictionLayer, "forward_single_position"),
    reason="no speculative step before 0.17",
)


def hidden_states(model, rows):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, 2, model.config.hidden_size, generator=generator)
    return hidden.to(next(model.parameters()))


@speculates
@needs_mtp
@pytest.mark.parametrize("stands_in", [None, "sharding", pytest.param("whole", marks=flagless)])
@pytest.mark.parametrize("tp", TP)
@pytest.mark.on_ranks
def test_rule_10_speculative_step(tp, stands_in):
    plain, tower = models.pair("mtp")
    plain.eval(), tower.eval()
    data = models.batch(8)
    hidden = hidden_states(plain, 8).chunk(tp)[common.tp_rank()]
    expected = speculative(plain, hidden, data)
    if stands_in:
        STAND_INS["function"](tower, stands_in == "sharding")
    with fix():
        actual = speculative(tower, hidden, data)
    assert expected.shape == hidden.shape and torch.equal(expected, actual)


@speculates
@needs_mtp
@on_two_ranks
def test_rule_10_speculative_step_on_full_length():
    """As the controller of 0.17 does: the tower's own embedding is right as it is."""
    _, tower = models.pair("mtp")
    tower.eval()
    data, inputs = models.batch(8), inputs_of_mtp(tower)
    hidden = hidden_states(tower, 8)
    errors = []
    for context in (contextlib.nullcontext, fix):
        with context():
            try:
                errors.append(speculative(tower, hidden, data))
            except RuntimeError as error:
                errors.append(error)
    assert [states.shape[0] for states in inputs] == [8, 8] and torch.equal(*inputs)
    assert torch.equal(*errors)


def detaching(original):
    """Trains MTP alone: what its layers embed and are given is cut from the rest."""

    def replaced(self, *args, **kwargs):
        *rest, decoder_input, hidden = original(self, *args, **kwargs)
        return (*rest, decoder_input.detach(), hidden)

    return replaced


def rewritten(original):
    """Calls the embedding itself, by position, and leaves the rest to the original."""
    signature = inspect.signature(original)

    def replaced(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        embedding = bound.arguments["embedding"]
        assert embedding.word_embeddings is not None

        def embed(input_ids, position_ids):
            return embedding(input_ids, position_ids)

        bound.arguments["embedding"] = embed
        return original(*bound.args, **bound.kwargs)

    return replaced


@pytest.mark.skipif(
    not hasattr(MultiTokenPredictionLayer, "_get_embeddings"), reason="no such method before 0.14"
)
@needs_mtp
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["class", "instance"])
@pytest.mark.parametrize("make", [detaching, pytest.param(rewritten, marks=runtime_form)])
@on_two_ranks
def test_rule_10_replaced_get_embeddings(make, where, when):
    plain, tower = models.pair("mtp")
    data, inputs = models.batch(LENGTH), inputs_of_mtp(tower)
    replaced = make(MultiTokenPredictionLayer.__dict__["_get_embeddings"])

    def replace(model, stack):
        if where == "class":
            place = common.instead(MultiTokenPredictionLayer, _get_embeddings=replaced)
            return stack.enter_context(place)
        for layer in model.mtp.layers:
            layer._get_embeddings = replaced.__get__(layer)
        return None

    with contextlib.ExitStack() as stack:
        replace(plain, stack)
        expected = models.step(plain, data)
    with contextlib.ExitStack() as stack:
        if when == "before":
            replace(tower, stack)
        stack.enter_context(fix())
        if when == "after":
            replace(tower, stack)
        actual = models.step(tower, data)
    check_same(expected, actual)
    for shard in inputs:
        check_shard(shard, LENGTH)


# Rule 11: clear refusals.


REFUSED = r"{0}.*tensor parallel size 4: pad it to {1} tokens, or set sequence_parallel=False"


@pytest.mark.parametrize(("length", "padded"), [(18, 20), (1, 4)])
@every_kind
@pytest.mark.on_ranks(tp=4, timeout=30)
def test_rule_11_indivisible_length(kind, length, padded):
    _, tower = models.pair(kind)
    data = models.batch(length)
    # A rank by itself: a collective would wait for the others for ever.
    if common.tp_rank() == 0:
        with fix(), pytest.raises(ValueError, match=REFUSED.format(length, padded)):
            models.forward(tower, data)
    elif not PATCHED:
        pytest.fail("only rank 0 can tell")


@pytest.mark.parametrize("name", marked(["wrapper", "function", "subclass"]))
@pytest.mark.on_ranks(tp=4, timeout=30)
def test_rule_11_custom_embedding_of_indivisible_length(name):
    _, tower = models.pair("gpt")
    STAND_INS[name](tower, False)
    with fix(), pytest.raises(ValueError, match=REFUSED.format(18, 20)):
        models.forward(tower, models.batch(18))


@pytest.mark.on_ranks(tp=4, timeout=30)
def test_rule_11_custom_embedding_by_what_it_returned():
    _, tower = models.pair("gpt")
    real = tower.embedding
    prompted = Prompted(real, False)
    prompted.prompt = torch.nn.Parameter(prompted.prompt[:3].detach())
    tower.embedding = prompted
    with fix(), pytest.raises(ValueError, match=REFUSED.format(19, 20)):
        models.forward(tower, models.batch(LENGTH))
