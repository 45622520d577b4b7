# SPDX-License-Identifier: Apache-2.0
"""Tests of the third patch."""

from megatron.core.tensor_parallel import VocabParallelEmbedding, mappings


class TestTowerReduceScatters(_TwoRanks):
    """A model with scatter_embedding_sequence_parallel=False communicates as one without."""

    @staticmethod
    def _embed(model):
        batch = _batch()
        return scatter_embeddings(
            model.embedding, batch['input_ids'], batch['position_ids'], model.config
        )

    @staticmethod
    def _count_collectives(monkeypatch):
        """Count the tensor parallel group's collectives, from here on."""
        counts = {}
        tp_group = parallel_state.get_tensor_model_parallel_group()

        def count(module, name):
            collective = getattr(module, name)

            def counted(*args, group=None, **kwargs):
                if group is tp_group:
                    counts[name] = counts.get(name, 0) + 1
                return collective(*args, group=group, **kwargs)

            monkeypatch.setattr(module, name, counted)

        count(torch.distributed, 'all_reduce')
        count(mappings, 'dist_reduce_scatter_func')
        count(mappings, 'dist_all_gather_func')
        return counts

    def test_one_reduce_scatter_and_one_all_gather(self, monkeypatch):
        _, tower = _plain_and_tower()
        counts = self._count_collectives(monkeypatch)
        shard = self._embed(tower)
        assert counts == {'dist_reduce_scatter_func': 1}
        shard.sum().backward()
        assert counts == {'dist_reduce_scatter_func': 1, 'dist_all_gather_func': 1}

    @pytest.mark.parametrize('kind', ['gpt', 'hybrid', 'mtp'])
    @pytest.mark.parametrize('position', ['none', 'learned_absolute'])
    def test_collectives_of_a_model_that_scatters(self, monkeypatch, kind, position):
        plain, tower = _plain_and_tower(kind=kind, position=position)
        counts = self._count_collectives(monkeypatch)
        _step(plain)
        expected = dict(counts)
        counts.clear()
        _step(tower)
        assert counts == expected

    @pytest.mark.parametrize('position', ['rope', 'learned_absolute'])
    def test_dropout_of_a_model_that_scatters(self, position):
        shards = []
        for model in _plain_and_tower(position=position, hidden_dropout=0.5):
            torch.manual_seed(123)
            model_parallel_cuda_manual_seed(123)
            shards.append(self._embed(model))
        assert (shards[0] == 0.0).any()
        assert torch.equal(*shards)

    @pytest.mark.parametrize('position', ['rope', 'learned_absolute'])
    @pytest.mark.parametrize('kind', ['plain', 'wraps', 'wraps anything'])
    @pytest.mark.parametrize('replaced', [VocabParallelEmbedding, LanguageModelEmbedding])
    def test_forward_that_was_replaced_in_its_class(self, monkeypatch, replaced, kind, position):
        plain, tower = _plain_and_tower(kind='mtp', position=position)
        original, calls = replaced.forward, []

        def forward(self, input_ids, position_ids=None):
            calls.append(self)
            if replaced is LanguageModelEmbedding:
                return original(self, input_ids, position_ids)
            return original(self, input_ids)

        def forward_of_all_rows(self, *args, **kwargs):
            calls.append(self)
            output = original(self, *args, **kwargs)
            assert self in plain.modules() or SEQ_LENGTH in output.shape[:2]
            return output

        replacement = forward_of_all_rows if kind == 'wraps anything' else forward
        if kind != 'plain':
            # What functools.wraps does.
            replacement.__module__, replacement.__wrapped__ = original.__module__, original
        monkeypatch.setattr(replaced, 'forward', replacement)
        _check_same(plain, tower)
        assert calls

    @pytest.mark.parametrize('shards', [True, False])
    def test_hook_that_changes_the_rows(self, shards):
        plain, tower = _plain_and_tower()
        change = (
            mappings.scatter_to_sequence_parallel_region
            if shards
            else mappings.gather_from_sequence_parallel_region
        )
        tower.embedding.register_forward_hook(lambda module, args, output: change(output))
        if shards:
            with pytest.raises(ValueError, match='4 rows of 16 tokens, not 8'):
                tower(**_batch())
        else:
            assert torch.equal(self._embed(tower), self._embed(plain))

    def test_hooks_of_one_rank(self):
        plain, tower = _plain_and_tower()
        seen = []
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for module in (tower.embedding, tower.embedding.word_embeddings):
                module.register_forward_hook(lambda module, *_: seen.append(module))
        _check_same(plain, tower)
        assert seen in ([], [tower.embedding.word_embeddings, tower.embedding])

    @pytest.mark.parametrize('position', ['rope', 'learned_absolute'])
    def test_length_is_checked_before_any_collective(self, monkeypatch, position):
        _, tower = _plain_and_tower(position=position)
        counts = self._count_collectives(monkeypatch)
        batch = {name: value[..., : SEQ_LENGTH - 1] for name, value in _batch().items()}
        with pytest.raises(ValueError, match='length 15 is not divisible .* size 2: pad it to 16'):
            tower(**batch)
        assert not counts
