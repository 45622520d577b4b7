# SPDX-License-Identifier: Apache-2.0
"""`audit` on built models, and `apply(also=...)` for classes that embed by themselves."""

import contextlib
import os
import types

import pytest
import torch
from common import check_same, check_shard, fix

import megatron_sp_fix
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron_sp_fix import NotCoveredError, UnsupportedMegatronError, audit, models, status

LENGTH = 16
SITE = next(site for site in status().sites if site.name.startswith("GPT"))
old = pytest.mark.skipif(
    SITE.name == "GPTModel.forward", reason="GPTModel has no _preprocess before 0.13"
)


class Calling(GPTModel):
    """Overrides `_preprocess`, and calls the original."""

    def _preprocess(self, *args, **kwargs):
        return super()._preprocess(*args, **kwargs)


class Embedding(GPTModel):
    """Embeds by itself, then leaves the rest to the original."""

    def _preprocess(self, input_ids, position_ids, decoder_input=None, **kwargs):
        if decoder_input is not None:
            pass
        elif self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
        return GPTModel.__dict__["_preprocess"](
            self, input_ids, position_ids, decoder_input, **kwargs
        )


class Scaling(GPTModel):
    """Does more to what it embedded than a shard handed in would get."""

    def _preprocess(self, input_ids, position_ids, decoder_input=None, **kwargs):
        if decoder_input is None:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
            decoder_input = decoder_input * 2.0
        return GPTModel.__dict__["_preprocess"](
            self, input_ids, position_ids, decoder_input, **kwargs
        )


class Sharding(GPTModel):
    """Shards after `_preprocess`."""

    def forward(self, input_ids, position_ids, attention_mask, **kwargs):
        decoder_input = self._preprocess(input_ids, position_ids)[0]
        decoder_input = tensor_parallel.scatter_to_sequence_parallel_region(decoder_input)
        return self.decoder(decoder_input, attention_mask)


class Elsewhere(GPTModel):
    """Never comes by `_preprocess`."""

    def forward(self, input_ids, position_ids, attention_mask, **kwargs):
        return self.decoder(self.embedding(input_ids, position_ids), attention_mask)


class Outer(torch.nn.Module):
    def __init__(self, tower):
        super().__init__()
        self.language_model = tower


def kinds():
    for kind in models.KINDS:
        if not models.has(kind):
            continue
        plain, tower = models.pair(kind)
        assert [t.kind for t in audit(plain)] == ["plain LM"] and audit(plain)[0].covered
        with fix():
            (found,) = audit(Outer(tower), strict=True)
        assert (found.name, found.kind, found.covered) == ("language_model", "tower", True)
        assert (found.cls, found.embedding) == (type(tower).__name__, "LanguageModelEmbedding")
        name = {"hybrid": "MambaModel.forward|HybridModel.forward"}.get(kind, SITE.name)
        if SITE.native == "none":
            with pytest.raises(NotCoveredError, match=rf"({name}) is not patched"):
                audit(tower, strict=True)
    tower.config.sequence_parallel = False
    assert "sequence parallelism is off" in audit(tower)[0].reason
    stages = [tower, models.build("gpt", False, pre_process=False)]
    assert [(t.name, t.kind) for t in audit(stages)] == [("0", "tower"), ("1", "tower")]
    assert audit(stages)[1].reason == "this stage does not embed"


def test_audit_tells_towers_from_plain_lms(run):
    run(kinds, tp=2)


def classes():
    reasons = {
        Calling: (True, "is patched"),
        Embedding: (False, "without calling the original: try apply(also=[Embedding])"),
        Scaling: (False, "without calling the original"),
        Sharding: (False, "Sharding.forward shards by itself"),
        Elsewhere: (False, "Elsewhere.forward does not call GPTModel._preprocess"),
    }
    for cls, (covered, reason) in reasons.items():
        _, tower = models.pair("gpt")
        tower.__class__ = cls
        with fix():
            (found,) = audit(tower)
            assert found.covered == covered and reason in found.reason, (cls, found)
            if not covered:
                with pytest.raises(NotCoveredError, match=cls.__name__):
                    audit(tower, strict=True)


@old
def test_audit_reads_subclasses(run):
    run(classes, tp=2)


def instances():
    _, tower = models.pair("gpt")
    cls = type(tower)

    def passing(self, *args, **kwargs):
        return cls.forward(self, *args, **kwargs)

    def embedding(self, input_ids, position_ids, attention_mask, decoder_input=None, **kwargs):
        decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
        return cls.forward(self, input_ids, position_ids, attention_mask, decoder_input, **kwargs)

    with fix():
        tower.forward = types.MethodType(passing, tower)
        audit(tower, strict=True)
        tower.forward = types.MethodType(embedding, tower)
        with pytest.raises(NotCoveredError, match="a forward of its own, which embeds by itself"):
            audit(tower, strict=True)


def test_audit_reads_methods_of_the_instance(run):
    run(instances, tp=2)


def also():
    plain, tower = models.pair("gpt")
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    tower.__class__ = Embedding
    original = Embedding.__dict__["_preprocess"]
    with contextlib.ExitStack() as stack:
        if not os.environ.get("UNPATCHED"):
            stack.callback(megatron_sp_fix.remove)
            replaced = megatron_sp_fix.apply(also=[Embedding])
            assert f"{__name__}.Embedding._preprocess" in replaced
        check_same(expected, actual := models.step(tower, data))
        check_shard(actual["shard"], LENGTH)
        assert audit(tower, strict=True)[0].reason.endswith("patched by apply(also=...)")
    assert Embedding.__dict__["_preprocess"] is original
    before = GPTModel.__dict__["_preprocess"]
    for cls, reason in (
        (Scaling, r"would skip line \d+ of Scaling, `decoder_input = decoder_input \* 2.0`"),
        (Calling, "has no one statement"),
        (Elsewhere, "has no one statement"),
        (Outer, "has no _preprocess or forward of its own"),
    ):
        with pytest.raises(UnsupportedMegatronError, match=reason):
            megatron_sp_fix.apply(also=[cls])
        assert GPTModel.__dict__["_preprocess"] is before, "half patched"


@old
def test_apply_also(run):
    run(also, tp=2)
