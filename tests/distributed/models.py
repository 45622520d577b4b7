# SPDX-License-Identifier: Apache-2.0
"""The demonstration's models, and what only tests ask of them.

That is: packed sequences, decoding, pipeline stages, process groups of their own, more position
embeddings, and bfloat16 under --bf16.
"""

import inspect
import itertools
import os

import torch

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_sp_fix.demo import models as demo
from megatron_sp_fix.demo.models import (  # noqa: F401 - for the tests
    VOCAB,
    Norm,
    batch,
    differences,
    forward,
    hybrid,
    local,
    seeded,
    step,
)

KINDS = ("gpt", "hybrid", "mtp")

# GPTModel reads these from its config, which does not declare them.
for name, value in {
    "rotary_scaling_factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "correction_range_round_to_int": True,
}.items():
    if not hasattr(TransformerConfig, f"yarn_{name}"):
        setattr(TransformerConfig, f"yarn_{name}", value)


class Attention(demo.Attention):
    """Causal attention that takes packed (``thd``) sequences, and steps of a decode."""

    def forward(self, query, key, value, attention_mask=None, packed_seq_params=None, **_):
        """Attend: ``[s, b, heads, d]``, or ``[tokens, heads, d]`` if packed, to one dim less."""
        packed = query.dim() == 3
        rows = [slice(None)]
        if packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            bounds = packed_seq_params.cu_seqlens_q.tolist()
            rows = [slice(*pair) for pair in itertools.pairwise(bounds)]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        causal = q.shape[2] == k.shape[2]  # else one step of a decode, which sees every key
        attend = torch.nn.functional.scaled_dot_product_attention
        parts = [attend(*(x[:, :, part] for x in (q, k, v)), is_causal=causal) for part in rows]
        out = torch.cat(parts, 2).permute(2, 0, 1, 3).flatten(2)
        return out.squeeze(1) if packed else out


def packed(*lengths):
    """Describe sequences of these lengths, packed into one."""
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    bounds = bounds.to(torch.cuda.current_device())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def has(kind):
    """Whether the installed release can build this kind of model without Transformer Engine."""
    try:
        if kind == "hybrid":
            demo.hybrid(None)
        elif kind == "mtp":
            # What every MTP layer asks of its projection, after 0.19: a TypeError without it.
            from megatron.core.tensor_parallel import inference_layers

            inference_layers.is_inference_column_parallel_linear(None)
    except (ImportError, AttributeError):
        return kind != "hybrid"
    except TypeError:
        return False
    return True


def build(
    kind,
    scatter,
    *,
    position=None,
    attention=Attention,
    layers=2,
    pre_process=True,
    post_process=True,
    config=None,
    model=None,
    **more,
):
    """Build a model, as the demonstration's function of this name does.

    `layers` are those of all stages, `pre_process` tells whether this one embeds, and
    `post_process` whether it computes logits.
    """
    fields = {"num_layers": layers, **(config or {})}
    if position == "mrope":
        fields.setdefault("mrope_section", [1, 1, 2])
    if os.environ.get("BF16"):
        dtypes = dict.fromkeys(("params_dtype", "pipeline_dtype"), torch.bfloat16)
        fields = {"bf16": True, **dtypes, **fields}
    fields.setdefault("pipeline_dtype", torch.float32)
    arguments = {"pre_process": pre_process, "post_process": post_process, **(model or {})}
    for name in ("pipeline_model", "context", "expert_model"):
        size = getattr(parallel_state, f"get_{name}_parallel_world_size")()
        fields.setdefault(f"{name}_parallel_size", size)
    stages = fields.get("pipeline_model_parallel_size", 1)
    here = layers // stages // fields.get("virtual_pipeline_model_parallel_size", 1)
    built = demo.build(
        kind,
        scatter,
        position=position,
        attention=attention,
        layers=here,
        config=fields,
        model=arguments,
        **more,
    )
    return built.bfloat16() if os.environ.get("BF16") else built


def pair(kind, **options):
    """Build a plain LM and a tower with the same weights; options as those of :func:`build`."""
    seeded(1)
    plain, tower = (build(kind, scatter, **options) for scatter in (True, False))
    tower.load_state_dict(plain.state_dict())
    return plain, tower


def parameters(kind):
    """Names of the parameters of the model's constructor and forward in this release."""
    cls = demo.hybrid(None)[0] if kind == "hybrid" else GPTModel
    return {*inspect.signature(cls).parameters, *inspect.signature(cls.forward).parameters}
