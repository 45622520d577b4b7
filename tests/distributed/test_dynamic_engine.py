# SPDX-License-Identifier: Apache-2.0
"""megatron-core's dynamic inference engine on whole models of Transformer Engine layers.

Dynamic batching takes flash-attn's kernels and no others. Where they are not installed, the same
attention over the same paged cache stands in for them, in PyTorch's operations.
"""

import contextlib
import itertools
import types
from typing import NamedTuple

import common
import pytest
import torch
from common import RELEASE, fix, tp_rank, tp_size
from engine import VOCAB, needs_engine, pair

from megatron.core.transformer import attention

pytestmark = [
    needs_engine,
    pytest.mark.skipif(RELEASE < (0, 18), reason="the engine is made in another way before 0.18"),
]

#: Under "tensorwise", a padding row that is not zero changes the scale of all rows.
FP8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}


def attend(query, keys, values, blocks, length):
    """Attend causally from one request's last tokens ``[s, heads, d]`` to its `length` tokens."""
    if not length:  # a request that only pads the batch
        return torch.zeros_like(query)
    key, value = (
        cache[blocks.clamp(min=0)].flatten(0, 1)[:length].transpose(0, 1)
        for cache in (keys, values)
    )
    mask = torch.ones(query.shape[0], length, dtype=torch.bool, device=query.device)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), key, value, attn_mask=mask.tril(length - query.shape[0])
    )
    return out.transpose(0, 1)


def prefill(query, keys, values, query_bounds, key_bounds, *_, block_table, **__):
    """What ``flash_attn_varlen_func`` computes; zero for the rows of no request."""
    out = torch.zeros_like(query)
    requests = itertools.pairwise(query_bounds.tolist())
    lengths = key_bounds.diff().tolist()
    for (start, stop), blocks, length in zip(requests, block_table, lengths):
        out[start:stop] = attend(query[start:stop], keys, values, blocks, length)
    return out


def decode(q, k_cache, v_cache, cache_seqlens, block_table, **_):
    """What ``flash_attn_with_kvcache`` computes."""
    requests = zip(q, block_table, cache_seqlens.tolist())
    return torch.stack([attend(one, k_cache, v_cache, *where) for one, *where in requests])


def kernels():
    """Let the attention of dynamic batching run, for a ``with`` block."""
    if attention.HAVE_FA4 or attention.HAVE_FA3 or attention.flash_attn_varlen_func:
        return contextlib.nullcontext()
    return common.instead(
        attention,
        is_fa_min_version=lambda _: True,
        flash_attn_varlen_func=prefill,
        flash_attn_with_kvcache=decode,
    )


class Served(NamedTuple):
    """What the engine computed on this rank."""

    tokens: dict  # generated, by request
    shards: list  # the decoder's input, of each forward
    logits: list  # of each call
    steps: list  # hidden states and logits of each speculative step
    dirty: int  # how many elements of padding rows were not zero


def generate(model, speculative, zero=False):
    """Serve three prompts, the last of which is prefilled in a batch with decodes of the others."""
    from megatron.core.inference.config import InferenceConfig
    from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
    from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt import gpt_inference_wrapper
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers import text_generation_controller

    context = DynamicInferenceContext(
        model.config,
        InferenceConfig(
            max_sequence_length=128,
            buffer_size_gb=0.05,
            max_requests=8,
            max_tokens=64,
            num_speculative_tokens=speculative,
        ),
    )
    wrapped = gpt_inference_wrapper.GPTInferenceWrapper(model, context)
    wrapped.prep_model_for_inference()
    tokenizer = types.SimpleNamespace(eod=VOCAB - 1, bos=None, detokenize=lambda tokens: "")
    controller = text_generation_controller.TextGenerationController(wrapped, tokenizer)
    engine = DynamicInferenceEngine(controller, context)
    tokens, shards, logits, steps, dirty = {}, [], [], [], 0

    def keep_shard(_, args, kwargs):
        nonlocal dirty
        shard = kwargs["hidden_states"]
        assert shard.shape[0] == context.padded_active_token_count // tp_size()
        padding = shard[max(context.active_token_count - tp_rank() * shard.shape[0], 0) :]
        dirty += padding.count_nonzero().item()
        if zero:
            padding.zero_()
        shards.append(shard.clone())

    def keep_logits(_, args, output):
        logits.append(output[0].clone())

    def keep_step(*args, **kwargs):
        hidden, predicted = compute(*args, **kwargs)
        steps.extend((hidden.clone(), predicted.clone()))
        return hidden, predicted

    compute, model.compute_mtp_single_step = model.compute_mtp_single_step, keep_step
    model.decoder.layers[0].register_forward_pre_hook(keep_shard, with_kwargs=True)
    model.output_layer.register_forward_hook(keep_logits)
    ids = torch.randint(VOCAB, (69,), generator=torch.Generator().manual_seed(0))
    for number, prompt in enumerate(ids.split([9, 40, 20])):  # of 64 tokens at a time
        how = SamplingParams(num_tokens_to_generate=5, top_k=1, termination_id=-1)
        engine.add_request(number, prompt.tolist(), how)
    while engine.has_unfinished_requests():
        for record in engine.step_modern()["finished_request_records"]:
            request = record.merge()
            tokens[request.request_id] = request.generated_tokens
    return Served(tokens, shards, logits, steps, dirty)


@pytest.mark.parametrize("fields", [{}, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("kind", ["gpt", "mtp", "*-"])
@pytest.mark.on_ranks(tp=2, timeout=240)
def test_engine_generates(kind, fields):
    """Prefill, decode and, for MTP, the speculative step; quantized, padding rows are zero."""
    plain, tower = pair(kind=kind, **fields)
    speculative = 2 if kind == "mtp" else 0
    with common.inference(), kernels():
        # On every rank but the first a plain LM leaves its padding rows as they are: zeroed here.
        expected = generate(plain, speculative, zero=bool(fields))
        with fix():
            actual = generate(tower, speculative)
    assert [len(actual.tokens[number]) for number in range(3)] == [5, 5, 5]
    assert expected.tokens == actual.tokens
    for name in ("shards", "logits", "steps"):
        before, after = getattr(expected, name), getattr(actual, name)
        assert len(before) == len(after) and all(map(torch.equal, before, after)), name
    assert bool(actual.steps) == bool(speculative)
    assert (actual.dirty == 0) == bool(fields)
