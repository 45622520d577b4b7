# SPDX-License-Identifier: Apache-2.0
"""`apply(also=...)`: models of others whose own methods embed, each against its plain LM.

ModelOpt's EAGLE-3 needs no naming; its classes and mbridge's are their own, the layers are those of
the demonstration, which need no Transformer Engine.
"""

import contextlib
import importlib.util
import os

import common
import models
import pytest
import torch
from common import check_same, check_shard, check_tower, fix

import megatron_sp_fix
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_sp_fix import audit

LENGTH = 16


def pair(cls):
    """A plain LM and a tower of a class of ours, which adds no parameters."""
    pair = models.pair("gpt")
    for model in pair:
        model.__class__ = cls
    return pair


def needs(name):
    return pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"{name} is not installed")


class Whole(GPTModel):
    """Its forward embeds and does all the rest by itself, as MindSpeed-MM's Qwen3.5 does."""

    def forward(self, input_ids, position_ids, attention_mask, decoder_input=None, labels=None):
        if decoder_input is None:
            decoder_input = self.embedding(input_ids, position_ids)
        return self.rest(decoder_input, input_ids.shape[1], attention_mask, labels)

    def rest(self, decoder_input, length, attention_mask, labels):
        states = self.decoder(
            hidden_states=decoder_input,
            attention_mask=attention_mask,
            rotary_pos_emb=self.rotary_pos_emb(length),
        )
        logits, _ = self.output_layer(states)
        return self.compute_language_model_loss(labels, logits)


class Always(Whole):
    """As :class:`Whole`, but takes no decoder's input; it embeds in a method of its own name."""

    def forward(self, input_ids, position_ids, attention_mask, labels=None):
        return self.embed_and_run(input_ids, position_ids, attention_mask, labels)

    def embed_and_run(self, ids, positions, attention_mask, labels):
        embedded = self.embedding(input_ids=ids, position_ids=positions)
        return self.rest(embedded, ids.shape[1], attention_mask, labels)


class Scaling(GPTModel):
    """Its `_preprocess`, or 0.12's forward, does more to what it embedded, then calls the original.

    Named, the original is given a shard; unnamed, all of it.
    """


def _scaling(original):
    def replaced(self, input_ids, position_ids, *args, decoder_input=None, **kwargs):
        args = [value for value in args if isinstance(value, torch.Tensor)]
        if decoder_input is None:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids) * 2.0
        return original(self, input_ids, position_ids, *args, decoder_input=decoder_input, **kwargs)

    return replaced


_OWNER, _METHOD = common.place()
setattr(Scaling, _METHOD, _scaling(vars(_OWNER)[_METHOD]))

#: What to name for each: the class, or a string.
NAMED = {
    "class": (Whole, Whole),
    "string": (Whole, "test_also:Whole"),
    "string of a method": (Whole, "test_also:Whole.forward"),
    "method without decoder_input": (Always, "test_also:Always.embed_and_run"),
    "whole forward without decoder_input": (Always, Always),
    "site": (Scaling, Scaling),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.on_ranks
def test_a_model_that_embeds_by_itself(name, tp):
    cls, also = NAMED[name]
    plain, tower = pair(cls)
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    with fix():
        assert [found.verdict for found in audit(tower)] == ["not covered"]
    with fix(also):
        actual = models.step(tower, data)
        assert [found.verdict for found in audit(tower)] == ["covered"]
        check_same(expected, models.step(plain, data))
    check_same(expected, actual)
    check_shard(actual["shard"], LENGTH)


@pytest.mark.on_ranks(tp=2)
def test_a_class_generated_without_source():
    space = {"rest": Whole.rest}
    exec(
        "def forward(self, input_ids, position_ids, attention_mask, labels=None):\n"
        "    embedded = self.embedding(input_ids, position_ids)\n"
        "    return rest(self, embedded, input_ids.shape[1], attention_mask, labels)",
        space,
    )
    plain, tower = pair(type("Generated", (GPTModel,), {"forward": space["forward"]}))
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    with fix(type(tower)):
        check_same(expected, actual := models.step(tower, data))
    check_shard(actual["shard"], LENGTH)


@pytest.mark.on_ranks(tp=2)
def test_under_an_outer_model_nothing_is_sharded_twice():
    plain, tower = pair(Whole)
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    with fix(Whole):
        full = tower.embedding(data["input_ids"], data["position_ids"])
        assert full.shape[0] == LENGTH
        given = tensor_parallel.scatter_to_sequence_parallel_region(full).clone()
        check_same(expected, models.step(tower, data, decoder_input=given))
        check_same(expected, models.step(tower, data))


# mbridge's Gemma 3: a forward that embeds by itself, and an embedding that scales.


def gemma3(cls, scatter):
    layer = models.local(gpt_layer_specs.get_gpt_layer_local_spec(), models.Attention)
    return cls(
        models.build("gpt", scatter).config,
        TransformerBlockSubmodules([layer] * 2, models.Norm),
        models.VOCAB,
        128,
        position_embedding_type="rope",
        scatter_embedding_sequence_parallel=scatter,
    ).to(torch.cuda.current_device())


@needs("mbridge")
@pytest.mark.parametrize("as_string", [True, False])
@pytest.mark.on_ranks(tp=2)
def test_mbridge_gemma3(as_string):
    for name, value in {"rope_local_base_freq": 10000, "embed_scale": 3.0}.items():
        setattr(TransformerConfig, name, value)  # fields of its own config
    if not hasattr(TransformerConfig, "enable_cuda_graph"):
        TransformerConfig.enable_cuda_graph = False  # which it still reads
    module = pytest.importorskip("mbridge.models.gemma3.gpt_model", exc_type=ImportError)
    cls = module.Gemma3GPTModel
    plain, tower = (gemma3(cls, scatter) for scatter in (True, False))
    tower.load_state_dict(plain.state_dict())
    data = models.batch(LENGTH)
    with fix(f"{module.__name__}:Gemma3GPTModel" if as_string else cls):
        assert plain.embedding.__class__ is module.LanguageModelEmbeddingScale
        check_tower(plain, tower, data, LENGTH)
        assert os.environ.get("UNPATCHED") or audit(tower, strict=True)[0].covered


# ModelOpt's EAGLE-3: a dynamic class whose methods embed for the base model and for the draft.


class Linear(torch.nn.Module):
    """In place of Transformer Engine's: every rank has all of it."""

    def __init__(self, inputs, outputs, **_):
        super().__init__()
        # On the CPU even where the plugin builds on a GPU: each rank draws the same.
        draw = {"generator": torch.Generator().manual_seed(4), "device": "cpu"}
        self.weight = torch.nn.Parameter(0.05 * torch.randn(outputs, inputs, **draw))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x)), None


@contextlib.contextmanager
def local_layers(plugin):
    """Let the plugin build its draft from local layers."""

    def spec(self, config):
        layer = gpt_layer_specs.get_gpt_layer_local_spec()
        return models.local(layer, models.Attention)

    class Block(plugin.EagleTransformerBlock):
        def __init__(self, config, spec, **more):
            super().__init__(config, TransformerBlockSubmodules([spec], models.Norm), **more)

    changes = {
        "TENorm": lambda config, size, *_: models.Norm(config, size),
        "TELinear": Linear,
        "EagleTransformerBlock": Block,
        # It hands a mask to Transformer Engine's attention; the local one has its own.
        "te_dot_product_attention_with_cp": lambda *_: contextlib.nullcontext(),
    }
    with (
        common.instead(plugin, **changes),
        common.instead(plugin.EagleModule, _get_eagle_transformer_layer_spec=spec),
    ):
        yield


def eagle_mode(model):
    """ModelOpt's mode: an EAGLE-3 draft of one layer, trained with the base model."""
    from modelopt.torch.speculative.eagle.default_config import default_eagle_config

    config = model.config
    draft = {
        **default_eagle_config,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_hidden_layers": 1,
        "vocab_size": model.vocab_size,
        "draft_vocab_size": model.vocab_size,
        "max_position_embeddings": 128,
        "max_sequence_length": 128,
        "position_embedding_type": "rope",
        "use_aux_hidden_state": True,
        "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
        "use_last_layernorm": True,
        "has_lm_head": True,
    }
    return {
        "eagle_architecture_config": draft,
        "eagle_freeze_base_model": False,
        "eagle_ttt_steps": 1,
        "eagle_mix_hidden_states": False,
    }


def eagle(model, plugin):
    """Convert a model, with a draft of local layers."""
    import modelopt.torch.speculative as speculative

    models.seeded(1)
    with local_layers(plugin):
        speculative.convert(model, [("eagle", eagle_mode(model))])
    model.to(torch.cuda.current_device())
    return model.float()


@contextlib.contextmanager
def without_gpu():
    """The plugin moves what it makes to the GPU by name."""
    if torch.distributed.get_backend() == "nccl":
        yield
        return
    cuda = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *_, **__: self
    try:
        yield
    finally:
        torch.Tensor.cuda = cuda


def eagle_pair():
    plugin = pytest.importorskip(
        "modelopt.torch.speculative.plugins.megatron_eagle", exc_type=ImportError
    )
    pair = [eagle(model, plugin) for model in models.pair("gpt", layers=4)]
    data = models.batch(LENGTH)
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool, device=data["labels"].device)
    return plugin, *pair, data, {"attention_mask": mask.triu(1)}


@needs("modelopt")
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.on_ranks(tp=2, timeout=240)
def test_modelopt_eagle3(outer):
    """Standalone; and under the outer model, where only the draft embeds."""
    plugin, plain, tower, data, mask = eagle_pair()
    drafts = []
    for model in (plain, tower):
        model.eagle_module.enorm.register_forward_pre_hook(lambda _, args: drafts.append(args[0]))
    with common.instead(
        plugin, te_dot_product_attention_with_cp=lambda *_: contextlib.nullcontext()
    ):
        given = {}
        if outer:
            ids = {"input_ids": data["input_ids"], "position_ids": data["position_ids"]}
            shard = tensor_parallel.scatter_to_sequence_parallel_region(tower.embedding(**ids))
            given["decoder_input"] = shard.clone()
        expected = models.step(plain, data, **mask)
        with fix():
            assert os.environ.get("UNPATCHED") or all(
                getattr(plugin._DynamicEagleGPTModel, name).__wrapped__
                for name in ("_base_model_forward", "_get_eagle_module_inputs")
            )
            actual = models.step(tower, data, **mask, **given)
        check_same(expected, actual)
    assert len(drafts) == 2 and torch.equal(*drafts)
    check_shard(drafts[1], LENGTH)
    check_shard(actual["shard"], LENGTH)


@needs("modelopt")
@pytest.mark.on_ranks(tp=2, timeout=240)
def test_modelopt_eagle3_generates():
    _, plain, tower, data, _ = eagle_pair()
    plain.eval(), tower.eval()
    with torch.no_grad(), without_gpu():
        for length in (8, 7):  # one that it pads, too
            ids = data["input_ids"][:1, :length]
            expected = plain.pseudo_speculative_generate(ids, steps=3)
            with fix():
                actual = tower.pseudo_speculative_generate(ids, steps=3)
            assert expected[1].shape == (1, 3)
            assert all(torch.equal(*pair) for pair in zip(expected, actual))


@needs("modelopt")
@pytest.mark.on_ranks(tp=2, timeout=240)
def test_modelopt_eagle3_is_named_by_itself():
    plugin, _, tower, *_ = eagle_pair()
    cls = plugin._DynamicEagleGPTModel
    names = ("_base_model_forward", "_get_eagle_module_inputs", "pseudo_speculative_generate")
    before = [vars(cls)[name] for name in names]
    if not os.environ.get("UNPATCHED"):
        replaced = megatron_sp_fix.apply()
        assert [f"{plugin.__name__}.{cls.__name__}.{name}" in replaced for name in names] == [
            True
        ] * 3
    try:
        assert audit(tower, strict=True)[0].verdict == "covered"
    finally:
        megatron_sp_fix.remove()
    assert all(vars(cls)[name] is was for name, was in zip(names, before))
