# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: the CUDA random state, recomputation, CUDA graphs, compiled layers.

The rest of the suite runs over NCCL, too, on a machine with two GPUs or more.
"""

import contextlib
import inspect

import models
import pytest
import torch
from common import check_same, check_shard, check_tower, fix, keep_input_step, tp_rank

from megatron.core.transformer import cuda_graphs
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron_sp_fix import status

LENGTH = 16
RELEASE = tuple(int(part) for part in status().version.split(".")[:2])
pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a GPU")
KINDS = [kind for kind in models.KINDS if models.has(kind)]


def same(kind, config):
    plain, tower = models.pair(kind, config={"hidden_dropout": 0.1, **config})
    check_tower(plain, tower, models.batch(LENGTH), LENGTH)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.on_ranks()
def test_dropout_in_the_cuda_random_state(kind, tp):
    same(kind, {})


RECOMPUTE = {
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "selective": {"recompute_granularity": "selective"},
}


@pytest.mark.parametrize("granularity", RECOMPUTE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.on_ranks(tp=2)
def test_recomputation(kind, granularity):
    takes = inspect.signature(MultiTokenPredictionLayer._checkpointed_forward).parameters
    if (kind, granularity) == ("mtp", "full") and not {"padding_mask", "kwargs"} & takes.keys():
        pytest.skip("this release cannot recompute MTP, plain LMs too")
    same(kind, RECOMPUTE[granularity])


@pytest.mark.on_ranks(tp=2)
def test_compiled_layers():
    plain, tower = models.pair("gpt")
    for model in (plain, tower):
        # Each layer: around them the decoder enters megatron-core's random state, which takes a
        # lock of torch's that torch.compile then waits for, in plain LMs too.
        layers = model.decoder.layers
        for index, layer in enumerate(layers):
            layers[index] = torch.compile(layer, backend="aot_eager")
    check_tower(plain, tower, models.batch(LENGTH), LENGTH)


@contextlib.contextmanager
def random_state_for_graphs():
    """Dropout's, which the default one of megatron-core forbids to capture."""
    from megatron.core.tensor_parallel import random

    def use(graphs):
        random.initialize_rng_tracker(use_cudagraphable_rng=graphs, force_reset=True)
        random.model_parallel_cuda_manual_seed(1234)

    use(True)
    try:
        yield
    finally:
        use(False)


@pytest.mark.on_ranks(tp=2)
def test_captured_in_a_cuda_graph():
    """The model's input step, captured and replayed with other tokens."""
    plain, tower = models.pair("gpt", position="none")
    data = [models.batch(LENGTH, seed=seed) for seed in range(3)]
    keep_input_step(plain, tower)
    plain.eval(), tower.eval()
    with random_state_for_graphs(), fix(), torch.no_grad():
        expected = [models.forward(plain, each) for each in data]
        ids = {name: tensor.clone() for name, tensor in data[0].items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # which still writes `ids`
        with torch.cuda.stream(stream):
            models.forward(tower, ids)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            shard = models.forward(tower, ids)
        for each, out in zip(data, expected):
            for name, tensor in each.items():
                ids[name].copy_(tensor)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(shard, out)
    check_shard(shard, LENGTH)


def step_in_graphs(scatter, graphs, weights, data):
    """Record a step, replay it with other tokens; without graphs, just run both."""
    model = models.build("gpt", scatter, config={"cuda_graph_impl": graphs})
    model.load_state_dict(weights)
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)  # where graphs add, from 0.19 on
    torch.cuda.synchronize()  # megatron-core changes the stream while it builds layers
    models.step(model, data[0])
    cuda_graphs.create_cudagraphs()
    if graphs == "local":
        for layer in model.decoder.layers:
            (runner,) = layer.cudagraph_manager.cudagraph_runners
            assert runner.fwd_graph is not None and runner.bwd_graph is not None
    result = models.step(model, data[1])
    for name, parameter in model.named_parameters():
        grad = result.setdefault(f"grad {name}", torch.zeros_like(parameter))
        grad += parameter.main_grad
    return result


@pytest.mark.skipif(RELEASE < (0, 15), reason="no such graphs before 0.15")
@pytest.mark.on_ranks(tp=2)
def test_layers_in_graphs_of_megatron_core():
    """megatron-core's own graphs of every layer, forward and backward, beside a plain LM's."""
    data = [models.batch(LENGTH, seed=seed) for seed in range(2)]
    weights = models.build("gpt", True).state_dict()
    results = []
    for scatter, graphs in ((True, "none"), (True, "local"), (False, "local")):
        torch.cuda.synchronize()
        # Off the default stream, which a graph cannot depend on.
        with random_state_for_graphs(), torch.cuda.stream(torch.cuda.Stream()), fix():
            try:
                results.append(step_in_graphs(scatter, graphs, weights, data))
            finally:
                torch.cuda.synchronize()
                cuda_graphs.delete_cuda_graphs()  # collects them: NCCL ends no group before
    without, expected, actual = results
    check_same(expected, actual)
    # Not the gradients: with graphs 0.16.1 computes others, in plain LMs too.
    assert all(torch.equal(without[name], actual[name]) for name in ("logits 0", "loss"))
    check_shard(actual["shard"], LENGTH)


@pytest.mark.skipif(RELEASE < (0, 18), reason="contexts are made in another way before 0.18")
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.on_ranks(tp=2)
def test_dynamic_context_prefill_and_decode(quantized):
    """Real contexts of dynamic batching: a prefill, then a decode of every request."""
    from megatron.core.inference.config import InferenceConfig
    from megatron.core.inference.contexts import DynamicInferenceContext
    from megatron.core.inference.inference_request import DynamicInferenceRequest
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.utils import InferenceMode

    plain, tower = models.pair("gpt", position="none")
    keep_input_step(plain, tower)
    plain.eval(), tower.eval()
    if quantized:
        plain.config.fp8 = tower.config.fp8 = "hybrid"
    context = DynamicInferenceContext(
        plain.config,
        InferenceConfig(max_sequence_length=64, buffer_size_gb=0.05, max_requests=8, max_tokens=64),
    )
    for number in range(3):
        context.add_request(
            DynamicInferenceRequest(
                request_id=number,
                prompt_tokens=torch.arange(7, device="cuda") + number,
                sampling_params=SamplingParams(num_tokens_to_generate=4),
            )
        )
    padded = 0
    with torch.no_grad(), InferenceMode.active():
        for _ in range(2):
            context.initialize_attention_state()
            ids, positions = context.current_input_and_position_ids()
            ids = ids % models.VOCAB
            outputs = []
            for model in (plain, tower):
                call = {"input_ids": ids, "position_ids": positions, "attention_mask": None}
                with fix():
                    out = model(**call, inference_context=context, runtime_gather_output=True)
                outputs.append(out.unwrap() if hasattr(out, "unwrap") else out)
            start, stop, _ = context.padding_slice.indices(ids.shape[1])
            expected, actual = outputs
            if quantized:
                # The plain LM's are wrong: it counts rows of the sequence on a shard.
                offset = tp_rank() * expected.shape[0]
                expected[max(start - offset, 0) : max(stop - offset, 0)] = 0.0
            assert actual.shape[0] == ids.shape[1] // 2
            assert torch.equal(expected, actual)
            padded += stop - start
            active = torch.ones(3, dtype=torch.int32)
            context.update_requests(active, torch.arange(3))
    assert padded > 0
