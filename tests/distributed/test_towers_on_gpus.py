# SPDX-License-Identifier: Apache-2.0
"""The towers of megatron-bridge with their own layers of Transformer Engine, in bf16 over NCCL.

`test_downstream.py` gives the same providers local layers, for CPU ranks. Here a provider is told
its sizes; layers, experts and fusions are its own.
"""

import contextlib
import functools
import sys
from unittest import mock

import engine
import models
import pytest
import torch
from common import RELEASE, check_same, check_shard, fix
from test_downstream import (
    EXAONE,
    NEEDS,
    PROVIDERS,
    QWEN3_VL,
    STEP,
    batch,
    bridge,
    load,
    missing,
    nemotron,
    plain_step,
    settings,
)

from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron_sp_fix.towers import audit

MISSING = missing(*NEEDS)
pytestmark = [
    pytest.mark.downstream,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    bridge,
    engine.needs_engine,
    pytest.mark.skipif(RELEASE < (0, 18), reason="needs megatron-core 0.18"),
]

#: Sizes that the kernels of Transformer Engine take, and gradients where autograd leaves them.
SIZES = {
    "num_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 64,
    "ffn_hidden_size": 512,
    "vocab_size": engine.VOCAB,
    "seq_length": engine.LENGTH,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "bf16": True,
    **dict.fromkeys(("params_dtype", "autocast_dtype", "pipeline_dtype"), torch.bfloat16),
    "gradient_accumulation_fusion": False,
    "sequence_parallel": True,
}
#: What most bridges set by a checkpoint's configuration.
LLAMA = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "share_embeddings_and_output_weights": False,
}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 128,
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
    # Kimi's and MiniMax's bridges ask for "flex", which needs DeepEP.
    "moe_token_dispatcher_type": "alltoall",
    "moe_aux_loss_coeff": 1e-3,
}
SHARED = {
    **EXPERTS,
    "moe_layer_freq": [0, 1],
    "moe_shared_expert_intermediate_size": 128,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_dtype": "fp32",
}
#: A layer of Gated DeltaNet and one of attention. In this mode torch computes the former's rule.
DELTA = {
    **LLAMA,
    "linear_attention_freq": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "mrope_section": [3, 3, 2],
    "deterministic_mode": True,
}
MLA = {
    "multi_latent_attention": True,
    "position_embedding_type": "rope",
    "qk_layernorm": True,
    "num_query_groups": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_head_dim": 64,
    "qk_pos_emb_head_dim": 32,
    "v_head_dim": 64,
    "rope_type": "rope",
}


def spec(name, config):
    """The layers that a bridge puts into its provider, by the name of what builds them."""
    return load(name)(config, vp_stage=None)


def qwen3_spec(config):
    """As Qwen3VLModel's: attention with its own rotation."""
    layer = load("gpt_provider:default_layer_spec")(config)
    layer.submodules.self_attention.module = load(
        "qwen_vl.modelling_qwen3_vl.attention:Qwen3VLSelfAttention"
    )
    return layer


#: By family: its provider, what it is told, and the class that its outer model builds in place of
#: GPTModel. Last are those that compile the most kernels.
TOWERS = {
    "Qwen3-VL": (
        PROVIDERS["Qwen3-VL"][0],
        {**LLAMA, "mrope_section": [12, 10, 10], "transformer_layer_spec": qwen3_spec},
        QWEN3_VL,
    ),
    "GLM-4.5V": (
        PROVIDERS["GLM-4.5V"][0],
        {**SHARED, "mrope_section": [4, 6, 6], "mtp_num_layers": 1},
        None,
    ),
    "Kimi K2.5-VL": (
        PROVIDERS["Kimi K2.5-VL"][0],
        {
            **LLAMA,
            **SHARED,
            **MLA,
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_shared_expert_overlap": True,
            "cross_entropy_loss_fusion": True,
            "cross_entropy_fusion_impl": "te",
            "transformer_layer_spec": functools.partial(
                get_gpt_decoder_block_spec, use_transformer_engine=True
            ),
        },
        None,
    ),
    "Gemma 3-VL": (PROVIDERS["Gemma 3-VL"][0], {"interleaved_attn_pattern": (1, 1)}, None),
    "Qwen3-VL MoE": (
        "qwen_vl.qwen3_vl_provider:Qwen3VLMoEModelProvider",
        {**LLAMA, **EXPERTS, "mrope_section": [12, 10, 10], "transformer_layer_spec": qwen3_spec},
        QWEN3_VL,
    ),
    "Gemma 4-VL": (
        PROVIDERS["Gemma 4-VL"][0],
        {
            **EXPERTS,
            "moe_shared_expert_intermediate_size": 128,
            "interleaved_attn_pattern": (1, 1),
            "global_head_dim": 128,
        },
        None,
    ),
    "EXAONE 4.5 MTP": (
        "exaone.exaone45.exaone45_provider:Exaone45ModelProvider",
        # The softmax that it asks for is apex's.
        {**LLAMA, "qk_layernorm": True, "mtp_num_layers": 1, "masked_softmax_fusion": False},
        EXAONE,
    ),
    "Step 3.7 MTP": (
        "stepfun.step37_provider:Step37ModelProvider",
        {
            **LLAMA,
            **SHARED,
            "qk_layernorm": True,
            "layernorm_zero_centered_gamma": True,
            "mtp_num_layers": 1,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "sliding_attention_setting": {
                "window_size": [64, 0],
                "num_attention_heads": 8,
                "num_query_groups": 2,
                "kv_channels": 64,
            },
            "rotary_percents": [0.5, 1.0, 1.0],
            "rotary_base_per_layer": [5e6, 1e4, 1e4],
            "transformer_layer_spec": functools.partial(
                spec, "stepfun.step35_bridge:build_step35_layer_spec"
            ),
        },
        STEP,
    ),
    "Ernie 4.5-VL": (
        PROVIDERS["Ernie 4.5-VL"][0],
        {
            **LLAMA,
            **SHARED,
            # Grouped, Ernie's experts lack what this megatron-core asks for.
            "moe_grouped_gemm": False,
            "moe_intermediate_size": (128, 64),
            "mrope_section": [11, 11, 10],
        },
        None,
    ),
    "MiniMax M3": (
        "minimax_m3.minimax_m3_bridge:MiniMaxM3VLModelProvider",
        {
            **LLAMA,
            **SHARED,
            "position_embedding_type": "rope",
            "layernorm_zero_centered_gamma": True,
            "qk_layernorm": True,
            "rotary_percent": 0.5,
            "activation_func": quick_gelu,
            "activation_func_clamp_value": 7.0,
            "glu_linear_offset": 1.0,
            "bias_activation_fusion": False,
            "transformer_layer_spec": functools.partial(
                spec, "minimax_m3.minimax_m3_bridge:minimax_m3_block_spec"
            ),
        },
        None,
    ),
    "Ministral 3": (PROVIDERS["Ministral 3"][0], {}, None),
    "Qwen2.5-VL": (
        PROVIDERS["Qwen2.5-VL"][0],
        {**LLAMA, "add_qkv_bias": True, "mrope_section": [8, 12, 12]},
        None,
    ),
    "Qwen3-Omni": (
        "qwen_omni.qwen3_omni_provider:Qwen3OmniModelProvider",
        {**EXPERTS, "mrope_section": [12, 10, 10], "transformer_layer_spec": qwen3_spec},
        QWEN3_VL,
    ),
    "Qwen2.5-Omni": (
        "qwen_omni.qwen25_omni_provider:Qwen25OmniModelProvider",
        {"mrope_section": [8, 12, 12]},
        QWEN3_VL,
    ),
    "Qwen3-ASR": (
        "qwen3_asr.qwen3_asr_provider:Qwen3ASRModelProvider",
        {"mrope_section": [12, 10, 10], "transformer_layer_spec": qwen3_spec},
        QWEN3_VL,
    ),
    "Qwen2-Audio": (PROVIDERS["Qwen2-Audio"][0], {**LLAMA, "add_qkv_bias": True}, None),
    "Qwen3.5-VL": (PROVIDERS["Qwen3.5-VL"][0], DELTA, None),
    "Qwen3.5-VL MTP": (
        PROVIDERS["Qwen3.5-VL"][0],
        {
            **DELTA,
            "mtp_num_layers": 1,
            "transformer_layer_spec": functools.partial(
                spec, "qwen_vl.qwen35_vl_provider:_qwen35_build_language_block_spec"
            ),
        },
        QWEN3_VL,
    ),
    "Qwen3.5-VL MoE": (
        "qwen_vl.qwen35_vl_provider:Qwen35VLMoEModelProvider",
        {**DELTA, **EXPERTS, "moe_shared_expert_intermediate_size": 128},
        None,
    ),
    "Qwen3.5-VL, kernels of fla": (
        PROVIDERS["Qwen3.5-VL"][0],
        {**DELTA, "deterministic_mode": False},
        None,
    ),
}


def step(model, data, **more):
    """One step, whatever steps were before."""
    for module in model.modules():
        if hasattr(module, "reset_global_aux_loss_tracker"):
            module.reset_global_aux_loss_tracker()  # as after every step of an optimizer
    return plain_step(model, data, **more)


def compare(plain, tower):
    """The tower's step is the plain LM's, alone and called as the outer model does."""
    assert type(tower) is type(plain)
    assert plain.embedding.scatter_to_sequence_parallel
    assert not tower.embedding.scatter_to_sequence_parallel
    data = batch(tower, engine.batch())
    step(plain, data)  # which compiles and tunes kernels
    expected = step(plain, data)
    with fix():
        actual = step(tower, data)
    check_same(expected, actual)
    check_shard(actual["shard"], engine.LENGTH)

    def given(model):
        shard = actual["shard"].clone().requires_grad_()
        return step(model, data, decoder_input=shard) | {"grad decoder_input": shard.grad}

    # A layer of MTP embeds there, too: without the fix it has to be a plain LM's.
    expected = given(plain if tower.config.mtp_num_layers else tower)
    with fix():
        check_same(expected, given(tower))
        # Last: under --unpatched it is the numbers that are to fail, not the audit.
        audit(tower, strict=True)


def start():
    """Kernels are to repeat their bits; what an earlier model has left in globals goes."""
    from megatron.core.transformer.moe import moe_logging  # from 0.18 on

    torch.backends.cudnn.deterministic = True
    engine.forget_backend()
    moe_logging.destroy_moe_metrics_tracker()
    models.seeded(1)


def one_configuration():
    """Of each kernel of flash-linear-attention: the search for the fastest takes minutes."""
    from triton.runtime.autotuner import Autotuner, Heuristics

    for module in [sys.modules[name] for name in sys.modules if name.startswith("fla.")]:
        for kernel in vars(module).values():
            while isinstance(kernel, Heuristics):
                kernel = kernel.fn
            if isinstance(kernel, Autotuner):
                del kernel.configs[1:]


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.on_ranks(tp=2, timeout=240)
def test_provider_with_its_own_layers(family):
    name, fields, cls = TOWERS[family]
    if "linear_attention_freq" in fields and missing("fla"):
        pytest.skip("not installed: flash-linear-attention")
    provider_class = load(name)
    one_configuration()
    gpt = "megatron.bridge.models.gpt_provider.MCoreGPTModel"

    def build(**flag):
        start()
        provider = settings(provider_class, SIZES, **fields, **flag)
        with mock.patch(gpt, load(cls)) if cls else contextlib.nullcontext():
            model = provider.provide_language_model(pre_process=True, post_process=True)
        return model.to(torch.cuda.current_device()).bfloat16()  # as Float16Module does

    flag = "scatter_embedding_sequence_parallel"
    # The tower's is left as the family has it, in its provider or in the outer model's code.
    plain, tower = build(**{flag: True}), build(**({flag: False} if cls else {}))
    tower.load_state_dict(plain.state_dict())
    compare(plain, tower)


@pytest.mark.parametrize("pattern", ["*-", "*E", "M*-", "M*E"])
@pytest.mark.on_ranks(tp=2, timeout=240)
def test_nemotron_with_its_own_layers(pattern):
    if "M" in pattern and not engine.MAMBA:
        pytest.skip("not installed: mamba-ssm and causal-conv1d")
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    start()
    fields = {
        **SHARED,
        "moe_layer_freq": 1,
        "num_layers": None,
        "mamba_num_heads": 16,
        "mamba_head_dim": 64,
    }
    family = "Omni" if "E" in pattern else "VL"
    plain, outer = nemotron(family, hybrid_stack_spec, pattern, small=SIZES, **fields)
    compare(plain.bfloat16(), outer.bfloat16().language_model)
