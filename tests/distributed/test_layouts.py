# SPDX-License-Identifier: Apache-2.0
"""Every parallelism, checkpoints, odd sizes, faults and threads: a tower is still a plain LM."""

import copy
import io
import pickle
import sys
import threading

import pytest
import torch
from common import check_same, check_shard, check_tower, fix

import megatron_sp_fix
from megatron.core import parallel_state
from megatron_sp_fix import models, status

LENGTH = 16
RELEASE = tuple(int(part) for part in status().version.split(".")[:2])


def same(kind, length=LENGTH, size=2, config=None, **options):
    plain, tower = models.pair(kind, config=config or {}, **options)
    data = models.batch(length, size)
    check_tower(plain, tower, data, length)


def pipeline(kind):
    """The first stage embeds, the last does not, except for MTP; each against a plain LM's."""
    first = parallel_state.is_pipeline_first_stage()
    plain, tower = models.pair(kind, pre_process=first, post_process=not first)
    data = models.batch(LENGTH)
    received = torch.randn(LENGTH // 2, 2, plain.config.hidden_size).to(data["labels"].device)
    results = []
    for model in (plain, tower):
        if not first:
            model.set_input_tensor(received)
        with fix():
            results.append(models.forward(model, data))
    assert torch.equal(*results)
    # A stage that does not embed has nothing to mend: show that the fix is on all the same.
    whole = models.build(kind, False, pre_process=True, post_process=False)
    with fix():
        assert models.forward(whole, data).shape[0] == LENGTH // 2


@pytest.mark.parametrize("kind", [kind for kind in ("gpt", "mtp") if models.has(kind)])
def test_pipeline_stages(run, kind):
    if kind == "mtp" and torch.cuda.device_count() < 4:
        pytest.skip("megatron-core ties the weights of MTP's own embedding on GPUs alone")
    run(pipeline, kind, ranks=4, tp=2, pp=2)


def context_parallel():
    if torch.distributed.get_backend() == "gloo":
        # Attention asks for a stream to hand to its core, and ours has no use for one.
        torch.cuda.Stream = lambda: None
        # Positions would be split on a GPU, so there are none.
        same("gpt", position="none")
    else:
        same("gpt")


def test_context_parallel(run):
    run(context_parallel, ranks=4, tp=2, cp=2)


MOE = {"num_moe_experts": 4, "add_bias_linear": False}


@pytest.mark.skipif(RELEASE == (0, 16), reason="its MoE router needs Transformer Engine")
def test_expert_parallel(run):
    run(same, "gpt", LENGTH, 2, MOE, ranks=4, tp=2, ep=2)


@pytest.mark.parametrize("tp", [2, 4])
def test_one_sequence_as_short_as_tp(run, tp):
    run(same, "gpt", tp, 1, tp=tp)


@pytest.mark.skipif(RELEASE < (0, 17), reason="no muP scaling before 0.17")
def test_mup_scaling(run):
    run(same, "gpt", LENGTH, 2, {"use_mup": True, "mup_embedding_mult": 3.0}, tp=2)


def adapter():
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
            flag, self.words.reduce_scatter_embeddings = self.words.reduce_scatter_embeddings, False
            try:
                return self.words(ids) + self.b(self.a(ids))
            finally:
                self.words.reduce_scatter_embeddings = flag

    plain, tower = models.pair("gpt")
    # The plain LM must scatter late, too, to have an adapter.
    plain.embedding.reduce_scatter_embeddings = False
    for model in (plain, tower):
        model.embedding.word_embeddings = LowRank(model.embedding.word_embeddings)
    data = models.batch(LENGTH)
    check_tower(plain, tower, data, LENGTH)


def test_adapter_on_the_word_embedding(run):
    run(adapter, tp=2)


def toggled():
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


@pytest.mark.skipif(RELEASE < (0, 15), reason="no set_model_to_sequence_parallel before 0.15")
def test_sequence_parallelism_off_and_on_again(run):
    run(toggled, tp=2)


def checkpoint():
    """Keys and bytes of checkpoints are those of an unpatched tower, before and after a step."""
    _, tower = models.pair("gpt")
    data = models.batch(LENGTH)

    def saved():
        buffer = io.BytesIO()
        torch.save(tower.state_dict(), buffer)
        sharded = tower.sharded_state_dict()
        return buffer.getvalue(), {
            key: (value.key, value.global_offset, value.data.numpy(force=True).tobytes())
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


def test_checkpoints_are_unchanged(run):
    run(checkpoint, tp=2)


def copies():
    _, tower = models.pair("gpt")
    # Process groups are neither picklable nor copyable, patched or not.
    embedding_class = type(tower.embedding)
    with fix():
        assert pickle.loads(pickle.dumps(type(tower))) is type(tower)
        assert pickle.loads(pickle.dumps(embedding_class)) is embedding_class
        data, seen = models.batch(LENGTH), []
        hook = tower.embedding.embedding_dropout.register_forward_pre_hook(
            lambda *_: seen.append(copy.copy(tower))
        )
        expected = models.step(tower, data)
        hook.remove()
        # A copy made in the middle of a forward is a tower like any other.
        assert seen[0].embedding is tower.embedding
        check_same(expected, models.step(seen[0], data))
    check_shard(expected["shard"], LENGTH)


def test_copies_and_pickles(run):
    run(copies, tp=2)


def faults():
    """An exception at each line that runs inside the embedding leaves everything as it was."""
    _, tower = models.pair("gpt", position="none")
    tower.decoder, tower.post_process = Pass(), False
    data = models.batch(LENGTH)
    ids = {"input_ids": data["input_ids"], "position_ids": data["position_ids"]}
    full = tower.embedding(**ids)
    files = ("/embedding.py", "/language_model_embedding.py", "/tensor_parallel/layers.py")

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

    def attributes():
        return {name: dict(module.__dict__) for name, module in tower.embedding.named_modules()}

    with fix():
        total = attempt(0)
        before = attributes()
        for at in range(1, total + 1):
            with pytest.raises(Fault):
                attempt(at)
            after = attributes()
            assert before.keys() == after.keys()
            for name, values in before.items():
                assert values.keys() == after[name].keys(), (name, at)
                assert all(value is after[name][key] for key, value in values.items()), (name, at)
        assert total > 30
        assert attempt(0) == total
    assert torch.equal(tower.embedding(**ids), full)


def test_rule_5_an_exception_at_every_line(run):
    run(faults, tp=2)


def rounds():
    """One thread in standalone forwards, another an outer model that calls the embedding."""
    _, tower = models.pair("gpt", position="none")
    words = tower.embedding
    data = models.batch(LENGTH)
    flags, stop = [], threading.Event()

    def outer():
        while not stop.is_set():
            module = tower.embedding
            flags.append(
                module is words
                and not module.scatter_to_sequence_parallel
                and not module.reduce_scatter_embeddings
                and not module.word_embeddings.reduce_scatter_embeddings
            )

    tower.decoder, tower.post_process = Pass(), False
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=outer)
    thread.start()
    try:
        with fix(), torch.no_grad():
            for _ in range(1000):
                shard = models.forward(tower, data)
                assert shard.shape[0] == LENGTH // 2
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert len(flags) > 10_000 and all(flags)


class Pass(torch.nn.Module):
    def forward(self, hidden_states, **_):
        return hidden_states


def test_rule_5_ten_thousand_rounds(run):
    run(rounds, tp=2)


def subclasses():
    class Before(models.GPTModel):
        pass

    plain, tower = models.pair("gpt")
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    with fix():

        class After(models.GPTModel):
            pass

        for cls in (Before, After):
            tower.__class__ = cls
            actual = models.step(tower, data)
            check_same(expected, actual)
            check_shard(actual["shard"], LENGTH)


def test_subclasses_from_before_and_after(run):
    run(subclasses, tp=2)


def between_other_patches():
    """Another library's patch under ours, and one over it."""
    site = next(s for s in status().sites if s.name.startswith("GPT"))
    method = site.name.partition(".")[2]
    original = models.GPTModel.__dict__[method]
    calls = []

    def wrap(inner, name):
        def outer(self, *args, **kwargs):
            calls.append(name)
            return inner(self, *args, **kwargs)

        return outer

    plain, tower = models.pair("gpt")
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    setattr(models.GPTModel, method, wrap(original, "under"))
    try:
        with fix():
            setattr(models.GPTModel, method, wrap(models.GPTModel.__dict__[method], "over"))
            actual = models.step(tower, data)
        assert calls == ["over", "under"]
        check_same(expected, actual)
        check_shard(actual["shard"], LENGTH)
    finally:
        setattr(models.GPTModel, method, original)
        megatron_sp_fix.remove()


def test_between_other_peoples_patches(run):
    run(between_other_patches, tp=2)
