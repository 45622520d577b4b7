# SPDX-License-Identifier: Apache-2.0
"""Helpers of the tests that the source form adds: a plain LM and a tower with its weights."""

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

SEQ_LENGTH, BATCH_SIZE, HIDDEN_SIZE, VOCAB_SIZE, TP_SIZE = 16, 2, 32, 64, 2


def _language_model(scatter, kind='gpt', position='rope', **config):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=4,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=TP_SIZE,
        sequence_parallel=True,
        mtp_num_layers=1 if kind == 'mtp' else None,
        mtp_loss_scaling_factor=0.1,
        **{'hidden_dropout': 0.0, **config},
    )
    # Layers without norms, since a local norm may be of a kind that knows no sequence parallelism.
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = IdentityOp
    layer.submodules.pre_mlp_layernorm = IdentityOp
    arguments = {
        'vocab_size': VOCAB_SIZE,
        'max_sequence_length': SEQ_LENGTH,
        'position_embedding_type': position,
        'scatter_embedding_sequence_parallel': scatter,
    }
    if kind == 'hybrid':
        block = pytest.importorskip('megatron.core.models.hybrid.hybrid_block')
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        stack = ModuleSpec(
            module=block.HybridStack,
            params={'post_layer_norm': False},
            submodules=block.HybridStackSubmodules(attention_layer=layer),
        )
        model = HybridModel(config, hybrid_stack_spec=stack, hybrid_layer_pattern='*', **arguments)
    else:
        mtp_block = None
        if kind == 'mtp':
            mtp_block = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False)
            for name in ('enorm', 'hnorm', 'layer_norm'):
                setattr(mtp_block.layer_specs[0].submodules, name, IdentityOp)
        model = GPTModel(
            config,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[layer], layer_norm=None),
            mtp_block_spec=mtp_block,
            **arguments,
        )
    return model.cuda()


def _plain_and_tower(**options):
    """A model that scatters in its embedding, and one that does not, with the same weights."""
    plain, tower = (_language_model(scatter, **options) for scatter in (True, False))
    tower.load_state_dict(plain.state_dict())
    return plain, tower


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


def _step(model):
    """Loss, gradients and the embeddings that the decoder and the MTP layer were given."""
    embeddings, hooks = [], []
    hooks.append(
        model.decoder.register_forward_pre_hook(
            lambda _, args, kwargs: embeddings.append(kwargs['hidden_states']), with_kwargs=True
        )
    )
    if getattr(model, 'mtp', None) is not None:
        norm = model.mtp.layers[0].enorm
        hooks.append(norm.register_forward_pre_hook(lambda _, args: embeddings.append(args[0])))
    loss = model(**_batch())
    assert len(embeddings) == len(hooks)
    for hook in hooks:
        hook.remove()
    loss.mean().backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()], embeddings


def _check_same(plain, tower):
    loss, grads, shards = _step(plain)
    tower_loss, tower_grads, tower_shards = _step(tower)
    assert torch.equal(loss, tower_loss)
    for grad, tower_grad in zip(grads, tower_grads):
        assert (grad is None and tower_grad is None) or torch.equal(grad, tower_grad)
    for shard, tower_shard in zip(shards, tower_shards):
        assert tower_shard.shape == (SEQ_LENGTH // TP_SIZE, BATCH_SIZE, HIDDEN_SIZE)
        assert torch.equal(shard, tower_shard)
        # The whole sequence is not kept for backward.
        assert tower_shard.untyped_storage().nbytes() == shard.numel() * shard.element_size()
