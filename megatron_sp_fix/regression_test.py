# SPDX-License-Identifier: Apache-2.0

"""A language model built with scatter_embedding_sequence_parallel=False, run by itself."""

import inspect

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.models.common.embeddings.embedding import embed_for_decoder, shard_padding_mask
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.unit_tests.test_utilities import Utils

SEQ, BATCH, HIDDEN, VOCAB, TP = 16, 2, 32, 64, 2


def _build(scatter, position="rope", mtp=False, hybrid=False):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=TP,
        sequence_parallel=True,
        mtp_num_layers=1 if mtp else None,
        mtp_loss_scaling_factor=0.1,
    )
    # Local layers without norms, which Apex would make.
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = IdentityOp
    layer.submodules.pre_mlp_layernorm = IdentityOp
    common = {
        "vocab_size": VOCAB,
        "max_sequence_length": SEQ,
        "position_embedding_type": position,
        "scatter_embedding_sequence_parallel": scatter,
    }
    if hybrid:
        from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        stack = ModuleSpec(
            module=HybridStack,
            params={"post_layer_norm": False},
            submodules=HybridStackSubmodules(attention_layer=layer),
        )
        return HybridModel(
            config, hybrid_stack_spec=stack, hybrid_layer_pattern="*", **common
        ).cuda()
    block = None
    if mtp:
        block = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False)
        for name in ("enorm", "hnorm", "layer_norm"):
            setattr(block.layer_specs[0].submodules, name, IdentityOp)
    layers = TransformerBlockSubmodules(layer_specs=[layer], layer_norm=None)
    return GPTModel(config, transformer_layer_spec=layers, mtp_block_spec=block, **common).cuda()


def _pair(**options):
    plain, tower = _build(True, **options), _build(False, **options)
    tower.load_state_dict(plain.state_dict())
    return plain, tower


def _batch():
    ids = torch.randint(VOCAB, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(1)).cuda()
    return {
        "input_ids": ids[:, :-1].contiguous(),
        "position_ids": torch.arange(SEQ).expand(BATCH, SEQ).contiguous().cuda(),
        "attention_mask": torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool).triu(1).cuda(),
        "labels": ids[:, 1:].contiguous(),
    }


def _step(model, **more):
    """Run one training step; return the loss, the gradients and what the decoder was given."""
    seen = {}
    hook = model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    loss = model(**_batch(), **more)
    hook.remove()
    loss.mean().backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()], seen


def _check(plain, tower):
    (loss, grads, seen), (tower_loss, tower_grads, tower_seen) = _step(plain), _step(tower)
    shard, tower_shard = seen["hidden_states"], tower_seen["hidden_states"]
    assert torch.equal(loss, tower_loss)
    for grad, tower_grad in zip(grads, tower_grads):
        assert (grad is None and tower_grad is None) or torch.equal(grad, tower_grad)
    assert torch.equal(shard, tower_shard)
    assert tower_shard.shape == (SEQ // TP, BATCH, HIDDEN)
    # Nothing but the shard is kept for backward.
    assert tower_shard.untyped_storage().nbytes() == shard.numel() * shard.element_size()


@pytest.mark.skipif(Utils.world_size < TP, reason="needs two ranks")
class TestStandaloneTower:
    def setup_method(self, method):
        Utils.initialize_model_parallel(tensor_model_parallel_size=TP)
        model_parallel_cuda_manual_seed(123)

    def teardown_method(self, method):
        Utils.destroy_model_parallel()

    @pytest.mark.parametrize("position", ["rope", "learned_absolute", "none"])
    def test_same_as_plain_lm(self, position):
        _check(*_pair(position=position))

    def test_mtp_same_as_plain_lm(self):
        _check(*_pair(mtp=True))

    @pytest.mark.parametrize("position", ["rope", "none"])
    def test_hybrid_same_as_plain_lm(self, position):
        pytest.importorskip("megatron.core.models.hybrid.hybrid_block")
        _check(*_pair(position=position, hybrid=True))

    @pytest.mark.parametrize("mtp", [False, True])
    @pytest.mark.parametrize("shards", [False, True])
    def test_function_in_place_of_the_embedding(self, shards, mtp):
        plain, tower = _pair(mtp=mtp)
        full_length = tower.embedding

        def embed(input_ids, position_ids):
            embeddings = full_length(input_ids, position_ids)
            return scatter_to_sequence_parallel_region(embeddings) if shards else embeddings

        tower.__dict__["embedding"] = embed
        _check(plain, tower)

    def test_hook_of_one_rank_sees_the_embedding(self):
        plain, tower = _pair()
        seen = []
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            tower.embedding.register_forward_hook(lambda module, *_: seen.append(module))
            tower.embedding.word_embeddings.register_forward_hook(
                lambda module, *_: seen.append(module)
            )
        _check(plain, tower)
        assert seen in ([], [tower.embedding.word_embeddings, tower.embedding])

    def test_padding_mask(self):
        _, tower = _pair()
        ids = _batch()["input_ids"]
        mask = torch.arange(BATCH * SEQ, device=ids.device).view(BATCH, SEQ) % 3 == 0
        rank = parallel_state.get_tensor_model_parallel_rank()
        shard = shard_padding_mask(tower, mask, ids)
        assert torch.equal(shard, mask.chunk(TP, dim=1)[rank])
        assert shard_padding_mask(tower, shard, ids) is shard
        with pytest.raises(ValueError, match="padding_mask has shape"):
            shard_padding_mask(tower, mask[:, :3], ids)
        if "padding_mask" in inspect.signature(tower.forward).parameters:
            _, _, seen = _step(tower, padding_mask=mask)
            assert torch.equal(seen["padding_mask"], shard)

    @pytest.mark.parametrize("active", [3, SEQ // TP, SEQ - 3])
    def test_padding_rows_of_a_quantized_batch(self, active):
        _, tower = _pair(position="none")
        batch = {name: _batch()[name][:1] for name in ("input_ids", "position_ids")}

        class Context:
            active_token_count = active

            def is_dynamic_batching(self):
                return True

        expected = tower.embedding(**batch).detach()
        expected[active:] = 0.0
        tower.config.fp8 = "hybrid"
        with torch.no_grad():
            shard = embed_for_decoder(tower, **batch, inference_context=Context())
        rank = parallel_state.get_tensor_model_parallel_rank()
        assert torch.equal(shard, expected.chunk(TP)[rank])

    def test_outer_model_gets_full_length(self):
        _, tower = _pair()
        batch = _batch()
        for _ in range(2):
            full = tower.embedding(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
            assert full.shape[0] == SEQ
            tower(**batch)

    def test_indivisible_length(self):
        _, tower = _pair()
        batch = {name: value[..., : SEQ - 1] for name, value in _batch().items()}
        with pytest.raises(ValueError, match="not divisible by the tensor parallel size"):
            tower(**batch)

    @pytest.mark.skipif(
        not hasattr(MultiTokenPredictionLayer, "forward_single_position"),
        reason="no speculative step",
    )
    def test_mtp_speculative_step(self):
        plain, tower = _pair(mtp=True)
        batch = _batch()
        hidden = torch.randn(SEQ // TP, BATCH, HIDDEN).cuda()
        expected, actual = (
            model.mtp.layers[0].forward_single_position(
                hidden_states=hidden,
                next_token_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                embedding=model.embedding,
                attention_mask=batch["attention_mask"],
            )
            for model in (plain, tower)
        )
        assert torch.equal(expected, actual)
