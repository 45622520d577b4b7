# SPDX-License-Identifier: Apache-2.0
"""The language towers that other packages build, each against the plain LM of its own class.

The classes, their embeddings and forwards are megatron-bridge's and nvidia-modelopt's own; the
layers are those of the demonstration, which need no Transformer Engine. See docs/towers.md.
"""

import dataclasses
import importlib
import importlib.util
import os
import sys
import types
from unittest import mock

import common
import models
import pytest
import torch
from common import check_same, check_shard, fix

import megatron
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron_sp_fix.towers import audit

LENGTH = 16


def missing(*names):
    """Those of these modules that are not installed; none is imported."""
    absent = []
    for name in names:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            absent.append(name)
    return absent


def _bridge_folder():
    """Where megatron-bridge lies, found without importing it."""
    folders = (os.path.join(path, "bridge") for path in megatron.__path__)
    return next(filter(os.path.isdir, folders), None)


MISSING = [] if _bridge_folder() else ["megatron-bridge"]
# Its text models import transformers' classes of configurations; none is ever called here.
MISSING += missing("transformers")
try:
    from megatron.core.models import hybrid as _  # noqa: F401
except ImportError:
    MISSING += ["megatron-core 0.18"]

bridge = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
modelopt = pytest.mark.skipif(bool(missing("modelopt")), reason="needs the extra `distill`")
pytestmark = pytest.mark.downstream

#: Packages of megatron-bridge that get an empty `__init__` where one of NEEDS is missing. Theirs
#: import every family's checkpoint converters, adapters and trainers, which need them.
NEEDS = ("transformer_engine", "megatron.training", "omegaconf")
BARE = (
    "megatron.bridge",
    "megatron.bridge.models",
    "megatron.bridge.models.conversion",
    "megatron.bridge.models.ernie_vl",
    "megatron.bridge.models.exaone",
    "megatron.bridge.models.exaone.exaone45",
    "megatron.bridge.models.gemma",
    "megatron.bridge.models.gemma_vl",
    "megatron.bridge.models.glm_vl",
    "megatron.bridge.models.kimi_vl",
    "megatron.bridge.models.ministral3",
    "megatron.bridge.models.mistral",
    "megatron.bridge.models.nemotron_omni",
    "megatron.bridge.models.nemotron_vl",
    "megatron.bridge.models.qwen_audio",
    "megatron.bridge.models.qwen_vl",
    "megatron.bridge.models.qwen_vl.modelling_qwen3_vl",
    "megatron.bridge.models.stepfun",
)


def load(name):
    """Import ``module:attribute`` of megatron-bridge's models, on a rank."""
    if missing(*NEEDS):
        for package in BARE:
            if package not in sys.modules:
                bare = types.ModuleType(package)
                bare.__path__ = [os.path.join(_bridge_folder(), *package.split(".")[2:])]
                sys.modules[package] = bare
                parent, _, leaf = package.rpartition(".")
                setattr(sys.modules[parent], leaf, bare)
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"megatron.bridge.models.{module}"), attribute)


def batch(model, data=None):
    data = data or models.batch(LENGTH)
    if model.position_embedding_type == "mrope":
        data["position_ids"] = data["position_ids"].expand(3, -1, -1).contiguous()
    return data


def compare(plain, tower, expected=models.step):
    """The tower's step is the plain LM's, bit by bit, and the audit says that it would be."""
    assert type(tower) is type(plain)
    assert plain.embedding.scatter_to_sequence_parallel
    assert not tower.embedding.scatter_to_sequence_parallel
    data = batch(tower)
    expected = expected(plain, data)
    with fix():
        actual = models.step(tower, data)
        check_same(expected, actual)
        check_shard(actual["shard"], LENGTH)
        # Last: under --unpatched it is the numbers that are to fail, not the audit.
        audit(tower, strict=True)
    return expected


# megatron-bridge's subclasses of GPTModel.


QWEN3_VL = "qwen_vl.modelling_qwen3_vl.text_model:Qwen3VLGPTModel"
EXAONE = "exaone.exaone45.modelling_exaone45.text_model:Exaone45GPTModel"
STEP = "stepfun.modelling_step37.text_model:Step37GPTModel"


def plain_step(model, data, **more):
    """One step of a plain LM of any of these classes, or of a tower."""
    plain = model.embedding.scatter_to_sequence_parallel
    if not plain or type(model).__name__ != "Qwen3VLGPTModel" or not model.mtp_process:
        return models.step(model, data, **more)
    # In front of MTP this forward shards whatever its embedding returns: right for a tower, once
    # too often for a plain LM, whose embedding has returned a shard.
    once = types.SimpleNamespace(scatter_to_sequence_parallel_region=lambda shard, group: shard)
    with mock.patch.object(sys.modules[type(model).__module__], "tensor_parallel", once):
        return models.step(model, data, **more)


@bridge
@pytest.mark.parametrize(
    ("name", "kind", "position"),
    [
        pytest.param(QWEN3_VL, "gpt", "mrope", id="Qwen3-VL"),
        pytest.param(QWEN3_VL, "mtp", "mrope", id="Qwen3-VL MTP"),
        pytest.param(EXAONE, "gpt", "rope", id="EXAONE 4.5"),
        pytest.param(EXAONE, "gpt", "mrope", id="EXAONE 4.5 mrope"),
        pytest.param(EXAONE, "mtp", "rope", id="EXAONE 4.5 MTP"),
        pytest.param(STEP, "gpt", "rope", id="Step 3.7"),
        pytest.param(STEP, "mtp", "rope", id="Step 3.7 MTP"),
    ],
)
@pytest.mark.on_ranks(tp=2)
def test_text_model(name, kind, position):
    if not models.has(kind):
        pytest.skip("this release needs Transformer Engine for it")
    cls = load(name)
    with mock.patch.object(models.demo, "GPTModel", cls):
        plain, tower = models.pair(kind, position=position)
    assert type(tower) is cls

    expected = compare(plain, tower, plain_step)
    outputs = [name for name in expected if name.startswith("logits")] + ["loss"]
    assert len(outputs) == (4 if kind == "mtp" else 2)
    # As the outer model calls it; where there is MTP, it still embeds for that.
    with fix():
        actual = models.step(tower, batch(tower), decoder_input=expected["shard"])
    for output in outputs:
        assert torch.equal(expected[output], actual[output]), output


# Towers that a provider of megatron-bridge builds from its own configuration.

#: Small, in float32 and without what needs a GPU; everything else is the family's own.
SMALL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "kv_channels": 8,
    "ffn_hidden_size": 64,
    "vocab_size": models.VOCAB,
    "seq_length": 128,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "num_moe_experts": None,
    "mtp_num_layers": None,
    "bf16": False,
    "params_dtype": torch.float32,
    "autocast_dtype": torch.float32,
    "pipeline_dtype": torch.float32,
    "attention_backend": AttnBackend.auto,
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "cross_entropy_loss_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "moe_permute_fusion": False,
    "moe_grouped_gemm": False,
    "persist_layer_norm": False,
    "sequence_parallel": True,
}


MROPE = {"mrope_section": [1, 1, 2]}
#: For families that rotate half of a head or less.
WIDE = {**MROPE, "kv_channels": 16, "rotary_percent": 0.5}
#: What Kimi's bridge sets.
MLA = {
    "multi_latent_attention": True,
    "position_embedding_type": "rope",
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 8,
    "rope_type": "rope",
}


def settings(cls, small=SMALL, **more):
    """A provider, small, on this rank's groups; fields that it lacks are left out."""
    fields = {**small, "tensor_model_parallel_size": common.tp_size(), **more}
    fields["use_cpu_initialization"] = torch.distributed.get_backend() == "gloo"
    known = {field.name: field for field in dataclasses.fields(cls)}
    fields = {name: value for name, value in fields.items() if name in known}
    provider = cls(**{name: value for name, value in fields.items() if known[name].init})
    for name, value in fields.items():
        setattr(provider, name, value)
    provider.finalize()
    return provider


def with_attention(spec, cls):
    """The spec with another class of self attention."""
    if isinstance(spec, ModuleSpec):
        module = cls if spec.module is SelfAttention else spec.module
        return dataclasses.replace(
            spec, module=module, submodules=with_attention(spec.submodules, cls)
        )
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
        return dataclasses.replace(spec, **{n: with_attention(v, cls) for n, v in fields.items()})
    return spec


BLOCK = "mtp_block_spec"
STOCK = "LanguageModelEmbedding"
#: By family: its provider, the class of the tower's embedding, more fields, its own attention.
PROVIDERS = {
    "Qwen2.5-VL": ("qwen_vl.qwen25_vl_provider:Qwen25VLModelProvider", STOCK, MROPE, None),
    "Qwen3-VL": ("qwen_vl.qwen3_vl_provider:Qwen3VLModelProvider", STOCK, MROPE, None),
    "Qwen3.5-VL": ("qwen_vl.qwen35_vl_provider:Qwen35VLModelProvider", STOCK, WIDE, None),
    "Qwen2-Audio": ("qwen_audio.qwen2_audio_provider:Qwen2AudioModelProvider", STOCK, {}, None),
    "Gemma 3-VL": (
        "gemma_vl.gemma3_vl_provider:Gemma3VLModelProvider",
        "Gemma3LanguageModelEmbedding",
        {},
        # Picks one of the two rotary embeddings that Gemma3RotaryEmbedding returns.
        "gemma.gemma3_provider:Gemma3SelfAttention",
    ),
    "Gemma 4-VL": (
        "gemma_vl.gemma4_vl_provider:Gemma4VLModelProvider",
        "Gemma3LanguageModelEmbedding",
        {
            "global_head_dim": 8,
            "num_global_key_value_heads": 4,
            # Belong to the experts, which are left out.
            "moe_ffn_hidden_size": None,
            "moe_shared_expert_intermediate_size": None,
        },
        "gemma.modeling_gemma4:Gemma4SelfAttention",
    ),
    "GLM-4.5V": (
        "glm_vl.glm_45v_provider:GLM45VModelProvider",
        STOCK,
        {**WIDE, "mtp_num_layers": 1},
        None,
    ),
    "Ernie 4.5-VL": ("ernie_vl.ernie45_vl_provider:Ernie45VLModelProvider", STOCK, MROPE, None),
    "Ministral 3": ("ministral3.ministral3_provider:Ministral3ModelProvider", STOCK, {}, None),
    "Kimi K2.5-VL": ("kimi_vl.kimi_k25_vl_provider:KimiK25VLModelProvider", STOCK, MLA, None),
}


@bridge
@pytest.mark.parametrize("family", PROVIDERS)
@pytest.mark.on_ranks(tp=2)
def test_provider(family):
    name, embedding, fields, attention = PROVIDERS[family]
    if fields.get("mtp_num_layers") and not models.has("mtp"):
        pytest.skip("this release needs Transformer Engine for MTP")
    cls = load(name)
    mla = fields.get("multi_latent_attention", False)
    spec = get_gpt_layer_local_spec(multi_latent_attention=mla)
    layer = models.local(spec, models.Attention)
    if attention:
        layer = with_attention(layer, load(attention))
    block = TransformerBlockSubmodules(layer_specs=[layer] * 2, layer_norm=models.Norm)

    def mtp(config, vp_stage=None):
        if not config.mtp_num_layers:
            return None
        spec = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False)
        return models.local(spec, models.Attention)

    def build(**more):
        provider = settings(cls, transformer_layer_spec=lambda config: block, **fields, **more)
        # The provider's own asks for Transformer Engine's layers.
        with mock.patch.object(sys.modules["megatron.bridge.models.gpt_provider"], BLOCK, mtp):
            model = provider.provide_language_model(pre_process=True, post_process=True)
        return model.to(torch.cuda.current_device())

    torch.manual_seed(1)
    # The tower's flag is left as the family has it.
    plain, tower = build(scatter_embedding_sequence_parallel=True), build()
    tower.load_state_dict(plain.state_dict())
    assert type(tower.embedding).__name__ == embedding
    compare(plain, tower)


# Nemotron's, as LLaVAModel of megatron-core builds it from a provider of megatron-bridge.


NEMOTRON = {
    "VL": ("nemotron_vl.nemotron_vl_provider:NemotronVLModelProvider", {}),
    "Omni": (
        "nemotron_omni.nemotron_omni_provider:NemotronOmniModelProvider",
        # From its checkpoint. LLaVAModel chooses the language model's class by the first.
        {"language_model_type": "nemotron6-moe", "image_token_index": models.VOCAB - 1},
    ),
}


def nemotron(family, stack, pattern, **fields):
    """A plain LM, and LLaVAModel around a tower with the same weights, without its encoder."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.models.multimodal.llava_model import LLaVAModel

    name, more = NEMOTRON[family]
    config = settings(load(name), hybrid_layer_pattern=pattern, **more, **fields)
    models.seeded(1)
    plain = HybridModel(
        config,
        hybrid_stack_spec=stack,
        vocab_size=config.vocab_size,
        max_sequence_length=config.seq_length,
        hybrid_layer_pattern=pattern,
    )
    outer = LLaVAModel(
        language_transformer_config=config,
        language_transformer_layer_spec=stack,
        language_vocab_size=config.vocab_size,
        language_max_sequence_length=config.seq_length,
        language_position_embedding_type=config.position_embedding_type,
        hybrid_layer_pattern=pattern,
        # What follows describes the encoder, which is left out.
        add_encoder=False,
        drop_vision_class_token=True,
        vision_transformer_config=config,
        vision_transformer_layer_spec=None,
        vision_projection_config=config,
        vision_projection_layer_spec=None,
        img_h=512,
        img_w=512,
        patch_dim=16,
        pixel_shuffle=True,
    )
    plain.to(torch.cuda.current_device())
    outer.to(torch.cuda.current_device()).language_model.load_state_dict(plain.state_dict())
    return plain, outer


@bridge
@pytest.mark.skipif(not models.has("hybrid"), reason="this release needs Transformer Engine")
@pytest.mark.parametrize("family", NEMOTRON)
@pytest.mark.on_ranks(tp=2)
def test_nemotron(family):
    stack = models.hybrid(models.local(get_gpt_layer_local_spec(), models.Attention))[1]
    plain, outer = nemotron(family, stack, "**")
    compare(plain, outer.language_model)
    with fix():
        assert [found.name for found in audit(outer, strict=True)] == ["language_model"]


# nvidia-modelopt's dynamic class around a student, with a teacher inside.


@modelopt
@pytest.mark.on_ranks(tp=2)
def test_modelopt_distillation():
    import modelopt.torch.distill as mtd
    from modelopt.torch.distill.plugins import megatron as plugin

    def convert(student, teacher):
        wish = plugin.DistillationConfig(skip_lm_loss=False)
        config = plugin.setup_distillation_config(wish, student.config, teacher.config)
        mode = {
            "teacher_model": teacher,
            "criterion": config.criterion,
            "loss_balancer": config.loss_balancer,
        }
        model = mtd.convert(student, mode=[("kd_loss", mode)])
        plugin.adjust_distillation_model_for_mcore(model, config)
        model.train()
        return model

    def total(model, loss):
        return model.compute_kd_loss(
            student_loss=loss.mean(), loss_reduction_fn=lambda out: out[0].mean()
        )["kd_loss"]

    def step(model, data):
        out = models.step(model, data)
        out["KD loss"] = total(model, out["loss"]).detach()
        model.zero_grad()
        total(model, models.forward(model, data)).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                out[f"grad by KD {name}"] = parameter.grad.clone()
        return out

    students = models.pair("gpt", layers=1)
    teachers = models.pair("gpt", layers=2, config={"init_method_std": 0.2})
    plain, tower = (convert(*both) for both in zip(students, teachers))
    assert isinstance(tower, mtd.DistillationModel) and tower.teacher_model is teachers[1]
    data = models.batch(LENGTH)
    expected = step(plain, data)
    with fix():
        actual = step(tower, data)
        check_same(expected, actual)
        check_shard(actual["shard"], LENGTH)
        audited = audit(tower, strict=True)
    assert expected["KD loss"] != expected["loss"].mean()
    assert [found.verdict for found in audited] == ["covered", "covered"]


@bridge
@pytest.mark.on_ranks(tp=2)
def test_gemma_4_dense():
    """Its provider builds a plain LM; with the flag passed on it would embed by itself."""
    install = load("gemma.modeling_gemma4:_install_ple_forward")
    for scatter in (True, False):
        model = models.build("gpt", scatter)
        install(model)
        with fix():
            (found,) = audit(model)
        assert found.verdict == ("nothing to shard" if scatter else "not covered"), found


@bridge
@pytest.mark.on_ranks(tp=2)
def test_gemma_4_dense_as_a_tower():
    """A forward of the instance is out of reach; the same one, of a class, is named in `also`."""
    install = load("gemma.modeling_gemma4:_install_ple_forward")
    plain, tower = models.pair("gpt")
    install(plain), install(tower)
    forward = tower.__dict__.pop("forward").__func__
    tower.__class__ = type("Gemma4Tower", (type(tower),), {"forward": forward})
    data = models.batch(LENGTH)
    expected = models.step(plain, data)
    with fix(type(tower)):
        actual = models.step(tower, data)
        check_same(expected, actual)
        check_shard(actual["shard"], LENGTH)
        audit(tower, strict=True)
