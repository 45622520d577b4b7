# SPDX-License-Identifier: Apache-2.0
"""Helpers of the tests that the source form adds: small models on two ranks, and a batch."""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


SEQ_LENGTH, BATCH_SIZE, HIDDEN_SIZE, VOCAB_SIZE, TP_SIZE = 16, 2, 32, 64, 2


def _config(hidden_dropout=0.0, **options):
    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=4,
        hidden_dropout=hidden_dropout,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=TP_SIZE,
        sequence_parallel=True,
        **options,
    )


def _layer_spec():
    # Without norms, since a local norm may be of a kind that knows no sequence parallelism.
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = IdentityOp
    layer.submodules.pre_mlp_layernorm = IdentityOp
    return layer


def _language_model(config, kind, **arguments):
    layer = _layer_spec()
    arguments.update(config=config, vocab_size=VOCAB_SIZE, max_sequence_length=SEQ_LENGTH)
    if kind == 'hybrid':
        stack = ModuleSpec(
            module=HybridStack,
            params={'post_layer_norm': False},
            submodules=HybridStackSubmodules(attention_layer=layer),
        )
        return HybridModel(hybrid_stack_spec=stack, hybrid_layer_pattern='*', **arguments).cuda()
    layers = TransformerBlockSubmodules(layer_specs=[layer], layer_norm=None)
    return GPTModel(transformer_layer_spec=layers, **arguments).cuda()


def _batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB_SIZE, (BATCH_SIZE, SEQ_LENGTH + 1), generator=generator).cuda()
    return {
        'input_ids': ids[:, :-1].contiguous(),
        'position_ids': torch.arange(SEQ_LENGTH).repeat(BATCH_SIZE, 1).cuda(),
        'attention_mask': torch.ones(1, 1, SEQ_LENGTH, SEQ_LENGTH, dtype=torch.bool).triu(1).cuda(),
        'labels': ids[:, 1:].contiguous(),
    }


class _TwoRanks:
    """Sets up and takes down tensor parallelism over two ranks."""

    def setup_method(self, method):
        if Utils.world_size % TP_SIZE:
            pytest.skip('needs an even number of ranks')
        Utils.initialize_model_parallel(tensor_model_parallel_size=TP_SIZE)
        model_parallel_cuda_manual_seed(123)

    def teardown_method(self, method):
        Utils.destroy_model_parallel()
