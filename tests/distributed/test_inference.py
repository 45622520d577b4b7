# SPDX-License-Identifier: Apache-2.0
"""Inference contexts: a prefill is a standalone forward, and under SP it runs on shards."""

import contextlib
import inspect

import common
import models
import pytest
import torch
from common import fix, inference, zeroes_padding

from megatron.core.inference.contexts import BaseInferenceContext, StaticInferenceContext
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron_sp_fix import status

LENGTH = 16


FLAGS = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextlib.contextmanager
def without_sp(model):
    """As engines decode: one token does not divide. What was on is on again afterwards."""
    holders = [model.config, *model.modules()]
    on = [(holder, flag) for holder in holders for flag in FLAGS if getattr(holder, flag, False)]
    for holder, flag in on:
        setattr(holder, flag, False)
    try:
        yield
    finally:
        for holder, flag in on:
            setattr(holder, flag, True)


def decoded(model, data):
    """The logits of a prefill under SP and of three steps of decoding without, by one cache."""
    context = StaticInferenceContext(2, LENGTH + 3)
    logits, start = [], 0
    for stop in range(LENGTH, LENGTH + 4):
        part = {name: data[name][:, start:stop] for name in ("input_ids", "position_ids")}
        with without_sp(model) if start else contextlib.nullcontext():
            out = models.forward(model, part, inference_context=context, runtime_gather_output=True)
        logits.append(out)
        context.sequence_len_offset = start = stop
        context.enable_decode_mode()
    return logits


@pytest.mark.skipif(
    status().version.startswith("0.12."), reason="no gathered logits under SP in 0.12"
)
@pytest.mark.parametrize("kind", [kind for kind in ("gpt", "hybrid") if models.has(kind)])
@pytest.mark.on_ranks(tp=2)
def test_static_context_prefill_and_decode(kind):
    plain, tower = models.pair(kind)
    plain.eval(), tower.eval()
    data = models.batch(LENGTH + 3)
    with torch.no_grad(), inference():
        expected = decoded(plain, data)
        with fix():
            actual = decoded(tower, data)
    assert [out.shape[1] for out in actual] == [out.shape[1] for out in expected]
    assert all(torch.equal(*pair) for pair in zip(expected, actual))


class DynamicContext(BaseInferenceContext):
    def __init__(self, active, padded):
        # The base class's own arguments differ between releases, and nothing here reads them. It
        # has no more than the release's own context has.
        own = inspect.getsource(DynamicInferenceContext)
        for name, value in {
            "active_token_count": active,
            "padding_slice": slice(active, padded),
        }.items():
            if f"self.{name} = " in own:
                setattr(self, name, value)

    def is_static_batching(self):
        return False


class Reached(Exception):
    """Carries what the decoder was given."""


class StopAtDecoder(torch.nn.Module):
    def forward(self, hidden_states, **_):
        raise Reached(hidden_states)


@pytest.mark.parametrize("quantized", [pytest.param(True, marks=zeroes_padding), False])
@pytest.mark.parametrize("active", [3, 8, 11, 16])
@pytest.mark.on_ranks(tp=2)
def test_inference_padding_rows_are_zeroed(active, quantized):
    _, tower = models.pair("gpt", position="none")
    tower.decoder = StopAtDecoder()
    tower.eval()
    data = models.batch(LENGTH, 1)
    ids = {"input_ids": data["input_ids"], "position_ids": data["position_ids"]}
    expected = tower.embedding(**ids).detach()
    if quantized:
        tower.config.fp8 = "hybrid"
        expected[active:] = 0.0
    expected = expected.chunk(common.tp_size())[common.tp_rank()]
    with fix(), torch.no_grad(), inference():
        context = DynamicContext(active, LENGTH)
        more = {"inference_context": context, "runtime_gather_output": True}
        with pytest.raises(Reached) as reached:
            tower(**ids, attention_mask=None, **more)
    (seen,) = reached.value.args
    assert torch.equal(seen.unwrap() if hasattr(seen, "unwrap") else seen, expected)
