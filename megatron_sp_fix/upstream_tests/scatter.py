# SPDX-License-Identifier: Apache-2.0
"""Tests of the second patch."""

from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import scatter_embeddings
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region


def _plain_and_tower(kind='gpt', position='rope', **options):
    """A model that scatters in its embedding, and one that does not, with the same weights."""
    arguments = {'position_embedding_type': position}
    if kind == 'mtp':
        options.update(mtp_num_layers=1, mtp_loss_scaling_factor=0.1)
    config = _config(**options)
    if kind == 'mtp':
        block = get_gpt_mtp_block_spec(config, _layer_spec(), use_transformer_engine=False)
        for name in ('enorm', 'hnorm', 'layer_norm'):
            setattr(block.layer_specs[0].submodules, name, IdentityOp)
        arguments['mtp_block_spec'] = block
    plain, tower = (
        _language_model(config, kind, scatter_embedding_sequence_parallel=scatter, **arguments)
        for scatter in (True, False)
    )
    tower.load_state_dict(plain.state_dict())
    return plain, tower


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


class _Scaled(LanguageModelEmbedding):
    def forward(self, input_ids, position_ids, tokentype_ids=None):
        return super().forward(input_ids, position_ids, tokentype_ids) * 3.0


class TestTowerThatEmbedsItsOwnTokens(_TwoRanks):
    """A model with scatter_embedding_sequence_parallel=False computes what one without computes."""

    @pytest.mark.parametrize(
        'kind, position',
        [
            ('gpt', 'rope'),
            ('gpt', 'learned_absolute'),
            ('hybrid', 'none'),
            ('hybrid', 'rope'),
            ('mtp', 'rope'),
            ('mtp', 'learned_absolute'),
        ],
    )
    def test_same_as_a_model_that_scatters(self, kind, position):
        _check_same(*_plain_and_tower(kind=kind, position=position))

    @pytest.mark.parametrize('kind', ['gpt', 'mtp'])
    def test_wrapper_that_scatters_is_not_scattered_again(self, kind):
        plain, tower = _plain_and_tower(kind=kind)
        embedding = tower.embedding

        def wrapper(input_ids, position_ids):
            return scatter_to_sequence_parallel_region(embedding(input_ids, position_ids)).clone()

        wrapper.scatter_to_sequence_parallel = False
        tower.__dict__['embedding'] = wrapper
        _check_same(plain, tower)

    def test_subclass_with_its_own_forward(self):
        plain, tower = _plain_and_tower()
        plain.embedding.__class__ = tower.embedding.__class__ = _Scaled
        _check_same(plain, tower)

    @pytest.mark.parametrize('scattered', [True, False])
    def test_speculative_step(self, scattered):
        _, tower = _plain_and_tower(kind='mtp')
        batch = _batch()
        ids = batch['input_ids'], batch['position_ids']
        expected = tower.embedding(*ids)
        if scattered:
            rank = parallel_state.get_tensor_model_parallel_rank()
            expected = expected.chunk(TP_SIZE)[rank]
        layer, seen = tower.mtp.layers[0], {}

        def project(**kwargs):
            seen.update(kwargs)
            return kwargs['hidden_states']

        layer._proj_and_transformer_layer = project
        layer.forward_single_position(
            hidden_states=torch.zeros_like(expected),
            next_token_ids=ids[0],
            position_ids=ids[1],
            embedding=tower.embedding,
        )
        assert torch.equal(seen['decoder_input'], expected)

    def test_outer_model_gets_the_whole_sequence(self):
        _, tower = _plain_and_tower()
        batch = _batch()
        for _ in range(2):
            whole = tower.embedding(batch['input_ids'], batch['position_ids'])
            assert whole.shape == (SEQ_LENGTH, BATCH_SIZE, HIDDEN_SIZE)
            tower(**batch)

    @pytest.mark.parametrize('embedding_class', [LanguageModelEmbedding, _Scaled])
    @pytest.mark.parametrize('clone', [True, False])
    def test_honours_clone_scatter_output_in_embedding(self, clone, embedding_class):
        _, tower = _plain_and_tower(
            position='learned_absolute', clone_scatter_output_in_embedding=clone
        )
        tower.embedding.__class__ = embedding_class
        shard = _step(tower)[2][0]
        owned = shard.untyped_storage().nbytes() == shard.numel() * shard.element_size()
        assert owned is clone

    def test_length_that_tensor_parallelism_does_not_divide(self):
        _, tower = _plain_and_tower()
        batch = {name: value[..., : SEQ_LENGTH - 1] for name, value in _batch().items()}
        with pytest.raises(ValueError, match='length 15 is not divisible .* size 2: pad it to 16'):
            tower(**batch)

    @pytest.mark.parametrize('ids', [None, torch.zeros(SEQ_LENGTH, dtype=torch.int64)])
    def test_ids_that_only_the_embedding_knows(self, ids):
        embeddings = torch.randn(SEQ_LENGTH, BATCH_SIZE, HIDDEN_SIZE).cuda()

        def embedding(input_ids, position_ids):
            return embeddings

        embedding.scatter_to_sequence_parallel = False
        rank = parallel_state.get_tensor_model_parallel_rank()
        actual = scatter_embeddings(embedding, ids, None, _config())
        assert torch.equal(actual, embeddings.chunk(TP_SIZE)[rank])

    def test_rows_that_an_embedding_adds_are_scattered(self):
        embeddings = torch.randn(SEQ_LENGTH + TP_SIZE, BATCH_SIZE, HIDDEN_SIZE).cuda()

        def soft_prompt(input_ids, position_ids):
            return embeddings

        batch, config = _batch(), _config()
        arguments = batch['input_ids'], batch['position_ids'], config
        # Without the attribute, it is left alone.
        assert scatter_embeddings(soft_prompt, *arguments) is embeddings
        soft_prompt.scatter_to_sequence_parallel = False
        rank = parallel_state.get_tensor_model_parallel_rank()
        part = embeddings.chunk(TP_SIZE)[rank]
        assert torch.equal(scatter_embeddings(soft_prompt, *arguments), part)
