# SPDX-License-Identifier: Apache-2.0
"""Models of megatron-core's own Transformer Engine layers, in bf16: a plain LM and its tower."""

import importlib.util
import os

import models
import pytest
import torch

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.transformer.transformer_config import TransformerConfig

ENGINE = importlib.util.find_spec("transformer_engine") is not None
needs_engine = pytest.mark.skipif(
    not ENGINE or torch.cuda.device_count() < 2, reason="needs Transformer Engine and two GPUs"
)
#: Whether Mamba layers can run.
MAMBA = all(map(importlib.util.find_spec, ("mamba_ssm", "causal_conv1d_cuda")))
# Some backward passes add up with atomics, which do not repeat their bits, unless these variables
# forbid it; the ranks, started later, inherit them.
os.environ.update(
    NVTE_ALLOW_NONDETERMINISTIC_ALGO="0", MAMBA_DETERMINISTIC="1", CAUSAL_CONV1D_DETERMINISTIC="1"
)
#: Sizes that FP8 takes.
LENGTH, VOCAB = 256, 512


def forget_backend():
    """Undo what the first model of a process chose for attention: megatron-core sets variables."""
    for name in [name for name in os.environ if name.startswith("NVTE_") and "_ATTN" in name]:
        del os.environ[name]


def build(scatter, kind="gpt", position="rope", model=None, **fields):
    """Build a model from megatron-core's own specs, on this rank's GPU.

    `kind` is "gpt", or "mtp" for two MTP layers, or the pattern of a hybrid model's layers;
    `fields` are those of ``TransformerConfig``, `model` has more arguments of the model.
    """
    pattern = None if kind in ("gpt", "mtp") else kind
    depths = pattern.count("/") if pattern else 2 * (kind == "mtp")
    forget_backend()
    models.seeded(1)
    tp = parallel_state.get_tensor_model_parallel_world_size()
    config = TransformerConfig(
        **{
            "num_layers": len(pattern.split("/")[0]) if pattern else 2,
            "hidden_size": 256,
            "ffn_hidden_size": 512,
            "num_attention_heads": 4,
            "mamba_num_heads": 16,  # of 64 each, so that the width of each rank is a multiple of 8
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "bf16": True,
            "params_dtype": torch.bfloat16,
            "pipeline_dtype": torch.bfloat16,
            "tensor_model_parallel_size": tp,
            "sequence_parallel": tp > 1,
            **({"mtp_num_layers": depths, "mtp_loss_scaling_factor": 0.1} if depths else {}),
            **fields,
        }
    )
    layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    more = dict(model or {})
    if kind == "mtp":
        more["mtp_block_spec"] = gpt_layer_specs.get_gpt_mtp_block_spec(
            config, layer, use_transformer_engine=True
        )
    cls = GPTModel
    if pattern:
        from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec as layer

        cls, _ = models.hybrid(None)
        new = cls.__name__ == "HybridModel"
        more["hybrid_layer_pattern" if new else "hybrid_override_pattern"] = pattern
    built = cls(
        config,
        layer,
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        position_embedding_type=position,
        scatter_embedding_sequence_parallel=scatter,
        **more,
    )
    return built.cuda().bfloat16()  # as megatron-core's Float16Module does


def pair(**options):
    """Build a plain LM and a tower with the same weights; options as those of :func:`build`."""
    plain, tower = (build(scatter, **options) for scatter in (True, False))
    tower.load_state_dict(plain.state_dict())
    return plain, tower


def batch(seed=0, size=2):
    """Make random ``input_ids``, ``position_ids`` and ``labels``, int64 ``[size, LENGTH]``."""
    return models.batch(LENGTH, size, seed, VOCAB)
