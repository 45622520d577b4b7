# SPDX-License-Identifier: Apache-2.0
"""Every parallelism, checkpoints, odd sizes, faults and threads: a tower is still a plain LM."""

import contextlib
import copy
import io
import multiprocessing
import pickle
import sys
import threading

import models
import pytest
import torch
from common import (
    check_same,
    check_shard,
    check_tower,
    check_unchanged,
    fix,
    fixed,
    full_length,
    keep_input_step,
    shadow,
    snapshot,
    tp_rank,
    tp_size,
)

import megatron_sp_fix
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron_sp_fix import status

LENGTH = 16
RELEASE = tuple(int(part) for part in status().version.split(".")[:2])


def same(kind, length=LENGTH, size=2, config=None, **options):
    plain, tower = models.pair(kind, config=config or {}, **options)
    data = models.batch(length, size)
    check_tower(plain, tower, data, length)


@contextlib.contextmanager
def no_gpu_needed():
    """For code of megatron-core that moves to a GPU, or waits for one, without a need."""
    real = torch.Tensor.cuda, torch.cuda.synchronize
    if torch.distributed.get_backend() == "gloo":
        torch.Tensor.cuda = lambda self, *_, **__: self
        torch.cuda.synchronize = lambda: None
    try:
        yield
    finally:
        torch.Tensor.cuda, torch.cuda.synchronize = real


def same_stage(plain, tower, embeds):
    """Run a pipeline stage of each on the same input: token ids, or what a stage before sent."""
    data = models.batch(LENGTH)
    received = torch.randn(LENGTH // 2, 2, plain.config.hidden_size).to(data["labels"].device)
    results = []
    for model in (plain, tower):
        if not embeds:
            model.set_input_tensor(received)
        with fix():
            results.append(models.forward(model, data))
    assert torch.equal(*results)
    return results[1]


@pytest.mark.parametrize("kind", [kind for kind in ("gpt", "mtp") if models.has(kind)])
@pytest.mark.on_ranks(tp=2, pp=2)
def test_pipeline_stages(kind):
    """The first stage embeds, the last does not, except for MTP; each against a plain LM's."""
    first = parallel_state.is_pipeline_first_stage()
    with no_gpu_needed():  # it ties the weights of MTP's own embedding there
        plain, tower = models.pair(kind, pre_process=first, post_process=not first)
    same_stage(plain, tower, first)
    data = models.batch(LENGTH)
    if first or kind != "mtp":
        # A stage that does not embed has nothing to mend: show that the fix is on all the same.
        whole = models.build("gpt", False, pre_process=True, post_process=False)
        with fix():
            assert models.forward(whole, data).shape[0] == LENGTH // 2


@pytest.mark.on_ranks(tp=2, pp=2, vpp=2)
def test_interleaved_stages():
    """Each rank holds two stages, and only the first of the first rank embeds."""
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    embedded = 0
    for stage in (0, 1):
        parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
        embeds, ends = first and stage == 0, not first and stage == 1
        more = {"vp_stage": stage} if "vp_stage" in models.parameters("gpt") else {}
        plain, tower = models.pair(
            "gpt",
            layers=4,
            pre_process=embeds,
            post_process=ends,
            config={"virtual_pipeline_model_parallel_size": 2},
            model=more,
        )
        out = same_stage(plain, tower, embeds)
        if embeds:
            assert out.shape[0] == LENGTH // 2
            embedded += 1
    assert embedded == first


@pytest.mark.on_ranks(tp=2, cp=2)
def test_context_parallel():
    if torch.distributed.get_backend() == "gloo":
        # Attention asks for a stream to hand to its core, and ours has no use for one.
        torch.cuda.Stream = lambda: None
        # Positions would be split on a GPU, so there are none.
        same("gpt", position="none")
    else:
        same("gpt")


@pytest.mark.skipif((0, 13) <= RELEASE <= (0, 16), reason="its MoE router needs Transformer Engine")
@pytest.mark.on_ranks(tp=2, ep=2)
def test_expert_parallel():
    same("gpt", config={"num_moe_experts": 4, "add_bias_linear": False})


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.on_ranks()
def test_one_sequence_as_short_as_tp(tp):
    same("gpt", tp, 1)


@pytest.mark.skipif(RELEASE < (0, 17), reason="no muP scaling before 0.17")
@pytest.mark.on_ranks(tp=2)
def test_mup_scaling():
    same("gpt", config={"use_mup": True, "mup_embedding_mult": 3.0})


@pytest.mark.on_ranks(tp=2)
def test_positions_without_a_label():
    """Positions without a label: the trainer's masked mean fits, as it does on a plain LM."""
    plain, tower = models.pair("gpt")
    data = models.batch(LENGTH)
    weight = torch.zeros_like(data["labels"], dtype=torch.float)
    weight[0, 5:] = 1.0
    results = []
    for model in (plain, tower):
        with fixed(model is plain):
            model.zero_grad()
            loss = (models.forward(model, data) * weight).sum() / weight.sum()
        loss.backward()
        grads = {f"grad {name}": p.grad for name, p in model.named_parameters()}
        results.append({"loss": loss.detach(), **grads})
    check_same(*results)


@pytest.mark.on_ranks(tp=2)
def test_adapter_on_the_word_embedding():
    """A low-rank adapter in the word embedding's place, as parameter-efficient tuning puts it."""

    class LowRank(torch.nn.Module):
        def __init__(self, words):
            super().__init__()
            torch.manual_seed(4)
            self.words = words
            self.a = torch.nn.Embedding(models.VOCAB, 4)
            self.b = torch.nn.Linear(4, words.embedding_dim, bias=False)
            self.to(words.weight.device)

        @property
        def weight(self):
            return self.words.weight

        def forward(self, ids):
            return full_length(self.words, ids) + self.b(self.a(ids))

    plain, tower = models.pair("gpt")
    # The plain LM must scatter late, too, to have an adapter.
    plain.embedding.reduce_scatter_embeddings = False
    for model in (plain, tower):
        model.embedding.word_embeddings = LowRank(model.embedding.word_embeddings)
    data = models.batch(LENGTH)
    check_tower(plain, tower, data, LENGTH)


@pytest.mark.skipif(RELEASE < (0, 15), reason="no set_model_to_sequence_parallel before 0.15")
@pytest.mark.on_ranks(tp=2)
def test_sequence_parallelism_off_and_on_again():
    from megatron.core.transformer.utils import set_model_to_sequence_parallel

    plain, tower = models.pair("gpt")
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    with fix():
        check_same(expected, models.step(tower, data))
        for model in (plain, tower):
            set_model_to_sequence_parallel(model, False)
        whole = models.step(tower, data)
        assert whole["shard"].shape[0] == LENGTH
        check_same(models.step(plain, data), whole)
        for model in (plain, tower):
            set_model_to_sequence_parallel(model, True)
        check_same(models.step(plain, data), models.step(tower, data))


@pytest.mark.on_ranks(tp=2)
def test_checkpoints_are_unchanged():
    """Keys and bytes of checkpoints are those of an unpatched tower, before and after a step."""
    _, tower = models.pair("gpt")
    data = models.batch(LENGTH)

    def saved():
        buffer = io.BytesIO()
        torch.save(tower.state_dict(), buffer)
        sharded = tower.sharded_state_dict()
        return buffer.getvalue(), {
            key: (value.key, value.global_offset, value.data.flatten().view(torch.uint8).tolist())
            for key, value in sharded.items()
            if getattr(value, "data", None) is not None and hasattr(value, "global_offset")
        }

    before = saved()
    with fix():
        first = models.step(tower, data)
        assert saved() == before
        other = models.build("gpt", False)
        other.load_state_dict(tower.state_dict())
        check_same(first, models.step(other, data))
    check_shard(first["shard"], LENGTH)
    assert saved() == before


@pytest.mark.skipif(RELEASE < (0, 13), reason="0.12 cannot write with this torch, any model")
@pytest.mark.on_ranks(tp=2)
def test_distributed_checkpoint_saved_and_loaded(tmp_path):
    """Saved by a patched tower: an unpatched one and a plain LM load it, at the same bytes."""
    from megatron.core import dist_checkpointing

    _, tower = models.pair("gpt")
    data = models.batch(LENGTH)
    # The writer starts processes, which those that a pool started are not allowed to do.
    multiprocessing.current_process()._config["daemon"] = False
    with fix(), no_gpu_needed():
        expected = models.step(tower, data)
        dist_checkpointing.save(tower.sharded_state_dict(), str(tmp_path))
    for writer in multiprocessing.active_children():
        writer.kill()  # some releases keep it for the next time
    torch.manual_seed(9)
    for scatter in (False, True):
        other = models.build("gpt", scatter)
        with fixed(scatter):
            other.load_state_dict(
                dist_checkpointing.load(other.sharded_state_dict(), str(tmp_path))
            )
            check_same(expected, models.step(other, data))
    check_shard(expected["shard"], LENGTH)


@pytest.mark.on_ranks(tp=2)
def test_copies_and_pickles():
    _, tower = models.pair("gpt")
    embedding_class = type(tower.embedding)
    with fix():
        assert pickle.loads(pickle.dumps(type(tower))) is type(tower)
        assert pickle.loads(pickle.dumps(embedding_class)) is embedding_class
        data = models.batch(LENGTH)
        expected = models.step(tower, data)
        tower.zero_grad()
        # Process groups cannot be copied, patched or not: the copy shares them.
        values = [value for module in tower.modules() for value in vars(module).values()]
        groups = ("ProcessGroup", "ProcessGroupCollection", "ModelCommProcessGroups")
        shared = {id(value): value for value in values if type(value).__name__ in groups}
        deep = copy.deepcopy(tower, shared)
        assert deep.embedding is not tower.embedding
        check_same(expected, models.step(deep, data))
    check_shard(expected["shard"], LENGTH)


@pytest.mark.on_ranks(tp=2)
def test_rule_5_an_exception_at_every_line():
    """An exception at each line of the embedding's call leaves everything as it was."""
    _, tower = models.pair("gpt", position="none")
    keep_input_step(tower)
    data = models.batch(LENGTH)
    ids = {"input_ids": data["input_ids"], "position_ids": data["position_ids"]}
    full = tower.embedding(**ids)
    files = ("/language_model_embedding.py", "/layers.py", "/mappings.py")

    class Fault(Exception):
        pass

    def attempt(at):
        """Raise at the line `at` of those that run; return how many ran."""
        lines = 0

        def trace(frame, event, argument):
            nonlocal lines
            if not frame.f_code.co_filename.endswith(files):
                return None
            if event == "line":
                lines += 1
                if lines == at:
                    raise Fault
            return trace

        sys.settrace(trace)
        try:
            with torch.no_grad():
                out = models.forward(tower, data)
        finally:
            sys.settrace(None)
        assert out.shape[0] == LENGTH // 2
        return lines

    with fix():
        total = attempt(0)
        before = snapshot(tower)
        for at in range(1, total + 1):
            with pytest.raises(Fault):
                attempt(at)
            check_unchanged(before, snapshot(tower))
        assert total > 20
        assert attempt(0) == total
    assert torch.equal(tower.embedding(**ids), full)


@pytest.mark.on_ranks(tp=2)
def test_apply_and_remove_raced_against_forwards():
    """Threads apply and remove as a model runs: a forward is wholly with the fix or without."""
    _, tower = models.pair("gpt", position="none")
    keep_input_step(tower)
    data = models.batch(LENGTH)
    full = tower.embedding(data["input_ids"], data["position_ids"]).detach()

    class Computed(torch.nn.Module):
        """No collective: ranks that are patched at different times must not wait for each other."""

        scatter_to_sequence_parallel = False

        def forward(self, input_ids, position_ids):
            return full

    shadow(tower, Computed())
    shard = full.chunk(tp_size())[tp_rank()]
    stop = threading.Event()

    def race():
        while not stop.is_set():
            with fix():
                pass

    threads = [threading.Thread(target=race) for _ in range(2)]
    for thread in threads:
        thread.start()
    outputs = []
    try:
        with torch.no_grad():
            while len(outputs) < 300 or (not any_shard(outputs) and len(outputs) < 3000):
                outputs.append(models.forward(tower, data))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert all(torch.equal(out, full) or torch.equal(out, shard) for out in outputs)
    assert any_shard(outputs)


def any_shard(outputs):
    return any(out.shape[0] == LENGTH // tp_size() for out in outputs)


@pytest.mark.on_ranks(tp=2)
def test_subclasses_from_before_and_after():
    class Before(GPTModel):
        pass

    plain, tower = models.pair("gpt")
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    with fix():

        class After(GPTModel):
            pass

        for cls in (Before, After):
            tower.__class__ = cls
            actual = models.step(tower, data)
            check_same(expected, actual)
            check_shard(actual["shard"], LENGTH)


@pytest.mark.on_ranks(tp=2)
def test_between_other_peoples_patches():
    """Another library's patch under ours, and one over it."""
    site = next(s for s in status().sites if s.name.startswith("GPT"))
    method = site.name.partition(".")[2]
    original = GPTModel.__dict__[method]
    calls = []

    def wrap(inner, name):
        def outer(self, *args, **kwargs):
            calls.append(name)
            return inner(self, *args, **kwargs)

        return outer

    plain, tower = models.pair("gpt")
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    setattr(GPTModel, method, wrap(original, "under"))
    try:
        with fix():
            setattr(GPTModel, method, wrap(GPTModel.__dict__[method], "over"))
            actual = models.step(tower, data)
        assert calls == ["over", "under"]
        check_same(expected, actual)
        check_shard(actual["shard"], LENGTH)
    finally:
        setattr(GPTModel, method, original)
        megatron_sp_fix.remove()
