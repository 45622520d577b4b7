# SPDX-License-Identifier: Apache-2.0
"""Tests of the first patch."""

from megatron.core import parallel_state
from megatron.core.inference.utils import InferenceMode


class TestPaddingRowsOfADynamicBatch(_TwoRanks):
    """A quantized model's decoder gets zeros for padding tokens, on every rank."""

    @pytest.mark.parametrize('active', [3, SEQ_LENGTH // TP_SIZE, SEQ_LENGTH - 3, SEQ_LENGTH])
    @pytest.mark.parametrize('kind', ['gpt', 'hybrid'])
    def test_padding_rows_are_zero_on_every_rank(self, kind, active):
        model = _language_model(_config(), kind, position_embedding_type='none').eval()
        model.config.fp8 = 'hybrid'
        model.post_process = False
        model.decoder = _ReturnsItsInput()
        context = _DynamicBatch()
        context.padding_slice = slice(active, SEQ_LENGTH)
        batch = _batch()
        ids = {name: batch[name][:1] for name in ('input_ids', 'position_ids')}
        rank = parallel_state.get_tensor_model_parallel_rank()
        with InferenceMode.active(), torch.no_grad():
            expected = model.embedding(**ids)
            positions = torch.arange(SEQ_LENGTH).chunk(TP_SIZE)[rank]
            expected[positions >= active] = 0.0
            actual = model(
                **ids, attention_mask=None, inference_context=context, runtime_gather_output=True
            )
        assert torch.equal(actual, expected)


class _ReturnsItsInput(torch.nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states.unwrap()


class _DynamicBatch:
    num_speculative_tokens = 0

    def is_dynamic_batching(self):
        return True
