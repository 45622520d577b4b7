# SPDX-License-Identifier: Apache-2.0
"""megatron-core's own Transformer Engine layers over NCCL: a tower against a plain LM, bit by bit.

One step of each model: FP8's delayed scaling remembers the steps before. The plain LM runs twice,
so that a baseline that does not repeat its own bits would be seen.
"""

import common
import engine
import models
import pytest
import torch
from common import RELEASE, check_same, check_shard, fixed
from engine import LENGTH

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

pytestmark = engine.needs_engine

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_grouped_gemm": True,
    "moe_token_dispatcher_type": "alltoall",
    "add_bias_linear": False,
}
FP8 = {
    "delayed": {"fp8": "hybrid", "fp8_recipe": "delayed"},
    "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
GPT = {
    "rope": {},
    "learned": {"position": "learned_absolute"},
    "dropout": DROPOUT,
    "full recomputation": {**DROPOUT, **FULL},
    "selective recomputation": {**DROPOUT, "recompute_granularity": "selective"},
    **{f"fp8 {recipe}": fields for recipe, fields in FP8.items()},
    "fp8 full recomputation": {**FP8["delayed"], **FULL},
    "moe": MOE,
    "moe fp8": {**MOE, **FP8["tensorwise"]},
}


def counted_step(model, data, **more):
    """A step, and the bytes of all storages that are saved for backward."""
    saved = []

    def save(tensor):
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        out = models.step(model, data, attention_mask=None, **more)
    return out, sum(saved)


def compare(data=None, more=None, **options):
    """A step of a plain LM, once more, and of a tower with the fix; each model is a new one."""
    data, results = data or engine.batch(), []
    for scatter in (True, True, False):
        model = engine.build(scatter, **options)
        with fixed(scatter):
            results.append(counted_step(model, data, **(more or {})))
    (expected, kept), (again, _), (actual, kept_by_tower) = results
    check_same(expected, again)
    check_same(expected, actual)
    check_shard(actual["shard"], data["input_ids"].shape[1])
    assert kept_by_tower == kept > 0


@pytest.mark.parametrize("case", GPT)
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.on_ranks
def test_gpt(case, tp):
    compare(**GPT[case])


@pytest.mark.on_ranks(tp=2)
def test_packed():
    compare(engine.batch(size=1), {"packed_seq_params": models.packed(96, 64, 96)})


@pytest.mark.parametrize("case", ["rope", "fp8 tensorwise", "moe"])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.on_ranks
def test_mtp(case, tp):
    compare(kind="mtp", **GPT[case])


needs_mamba = pytest.mark.skipif(not engine.MAMBA, reason="needs mamba-ssm and causal-conv1d")
needs_hybrid_mtp = pytest.mark.skipif(RELEASE < (0, 17), reason="no MTP in hybrids before 0.17")


@pytest.mark.parametrize(
    "pattern",
    [
        "*-",
        "*E",
        pytest.param("*-/*", marks=needs_hybrid_mtp),
        pytest.param("M*-M", marks=needs_mamba),
        pytest.param("M*E/M", marks=[needs_mamba, needs_hybrid_mtp]),
    ],
)
@pytest.mark.on_ranks(tp=2)
def test_hybrid(pattern):
    """Of the stock stack: ``*`` attention, ``-`` an MLP, ``E`` experts, ``M`` Mamba, ``/`` MTP."""
    compare(kind=pattern, position="none", **(GPT["moe"] if "E" in pattern else {}))


@pytest.mark.skipif(
    not hasattr(MultiTokenPredictionLayer, "forward_single_position"),
    reason="no speculative step before 0.17",
)
@pytest.mark.on_ranks(tp=2)
def test_speculative_step():
    data, results = engine.batch(), []
    for scatter in (True, False):
        model = engine.build(scatter, kind="mtp").eval()
        hidden = torch.ones(LENGTH, 2, 256, dtype=torch.bfloat16, device=data["labels"].device)
        hidden *= torch.arange(LENGTH, device=data["labels"].device)[:, None, None] / LENGTH
        with fixed(scatter), torch.no_grad():
            results.append(
                model.mtp.layers[0].forward_single_position(
                    hidden_states=hidden.chunk(2)[common.tp_rank()],
                    next_token_ids=data["input_ids"],
                    position_ids=data["position_ids"],
                    embedding=model.embedding,
                )
            )
    expected, actual = results
    assert actual.shape == (LENGTH // 2, 2, 256) and torch.equal(expected, actual)


EXPERTS = {"expert_model_parallel_size": 2}


@pytest.mark.parametrize("case", ["moe", "moe fp8"])
@pytest.mark.on_ranks(tp=2, ep=2, ranks=2, expert_tensor_parallel_size=1)
def test_experts_of_two_ranks(case):
    compare(**EXPERTS, expert_tensor_parallel_size=1, **GPT[case])


@pytest.mark.parametrize("case", ["moe", "moe fp8"])
@pytest.mark.on_ranks(tp=4, ep=2, ranks=4, expert_tensor_parallel_size=2)
def test_experts_of_four_ranks(case):
    compare(**EXPERTS, expert_tensor_parallel_size=2, **GPT[case])


@pytest.mark.on_ranks(tp=2, cp=2)
def test_context_parallel():
    compare(context_parallel_size=2)


@pytest.mark.on_ranks(tp=2, pp=2)
def test_pipeline():
    """Two microbatches through megatron-core's own schedule."""
    first, data = parallel_state.is_pipeline_first_stage(), engine.batch()

    def mean(loss):
        return loss.float().mean(), {"loss": loss.detach()}

    def forward_step(_, model):
        return model(**data, attention_mask=None), mean

    results = []
    for scatter in (True, False):
        stage = {"pre_process": first, "post_process": not first}
        model = engine.build(scatter, model=stage, pipeline_model_parallel_size=2)
        with fixed(scatter):
            losses = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=None,
                model=[model],
                num_microbatches=2,
                seq_length=LENGTH,
                micro_batch_size=2,
                forward_only=False,
            )
        out = {f"loss {number}": loss["loss"] for number, loss in enumerate(losses)}
        grads = {f"grad {name}": weight.grad for name, weight in model.named_parameters()}
        results.append({**out, **grads})
    assert first or "loss 1" in results[-1]
    check_same(*results)


@pytest.mark.on_ranks(tp=2)
def test_one_reduce_scatter():
    """Of the input step alone: NCCL's kernels, as the profiler names them."""
    kernels = {}
    for scatter in (True, False):
        model = engine.build(scatter, position="none")
        common.keep_input_step(model)
        data = engine.batch()
        del data["labels"]
        with fixed(scatter), torch.profiler.profile() as profile:
            models.forward(model, data)
            torch.cuda.synchronize()
        kernels[scatter] = [
            event.name for event in profile.events() if event.name.startswith("ncclDevKernel")
        ]
    assert len(kernels[False]) == 1 and "ReduceScatter" in kernels[False][0], kernels
    assert kernels[False] == kernels[True]
