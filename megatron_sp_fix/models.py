# SPDX-License-Identifier: Apache-2.0
"""Small real megatron-core models, alike in every supported release: a plain LM and its tower.

Built from megatron-core's local layers, so that they run on CPU ranks without Transformer Engine.
"""

import dataclasses
import inspect
import itertools
from typing import Any, Optional

import torch
from torch import Tensor

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

__all__ = [
    "KINDS",
    "Norm",
    "batch",
    "build",
    "differences",
    "forward",
    "has",
    "pair",
    "parameters",
    "step",
]

KINDS = ("gpt", "hybrid", "mtp")
VOCAB = 64


class Norm(torch.nn.LayerNorm):
    """A layer norm for the local layers: torch's, with the mark that SP needs on its weights."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class Attention(torch.nn.Module):
    """Causal attention that takes packed (``thd``) sequences and builds no ``[s, s]`` mask."""

    def __init__(self, config: TransformerConfig, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Optional[Tensor] = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """Attend within each sequence.

        Args:
            query: ``[s, b, heads, d]``, or ``[tokens, heads, d]`` if packed.
            key: as ``query``, with as many heads or fewer.
            value: as ``key``.
            attention_mask: not read.
            packed_seq_params: bounds of packed sequences, or None.

        Returns:
            Tensor: ``[s, b, heads * d]``, or ``[tokens, heads * d]`` if packed.
        """
        packed = query.dim() == 3
        rows = [slice(None)]
        if packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            bounds = packed_seq_params.cu_seqlens_q.tolist()
            rows = [slice(*pair) for pair in itertools.pairwise(bounds)]
        groups = query.shape[2] // key.shape[2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        causal = q.shape[2] == k.shape[2]  # else one step of a decode, which sees every key
        out = torch.cat(
            [
                torch.nn.functional.scaled_dot_product_attention(
                    q[:, :, part], k[:, :, part], v[:, :, part], is_causal=causal
                )
                for part in rows
            ],
            2,
        )
        out = out.permute(2, 0, 1, 3).flatten(2)
        return out.squeeze(1) if packed else out


def has(kind: str) -> bool:
    """Whether the installed release can build this kind of model without Transformer Engine."""
    try:
        if kind == "hybrid":
            _hybrid()
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
    kind: str,
    scatter: bool,
    *,
    position: Optional[str] = None,
    attention: type = Attention,
    layers: int = 2,
    pre_process: bool = True,
    post_process: bool = True,
    pg_collection: Any = None,
    config: Optional[dict[str, Any]] = None,
    model: Optional[dict[str, Any]] = None,
) -> Any:
    """Build a model.

    Args:
        kind: one of :data:`KINDS`.
        scatter: True for a plain LM, False for a tower.
        position: ``position_embedding_type``; by default ``"none"`` for a hybrid, else ``"rope"``.
        attention: the core attention's class.
        layers: transformer layers.
        pre_process: whether this stage embeds.
        post_process: whether this stage computes logits.
        pg_collection: process groups in place of the global ones.
        config: more fields of ``TransformerConfig``.
        model: more arguments of the model.

    Returns:
        A ``GPTModel``, ``HybridModel`` or ``MambaModel`` in float32 on this rank's device.
    """
    from megatron.core import parallel_state

    position = position or ("none" if kind == "hybrid" else "rope")
    fields = dict(config or {})
    if pg_collection is None:
        for name in ("tensor_model", "pipeline_model", "context", "expert_model"):
            size = getattr(parallel_state, f"get_{name}_parallel_world_size")()
            fields.setdefault(f"{name}_parallel_size", size)
    tp = fields["tensor_model_parallel_size"]
    heads = 4 if 4 % tp == 0 else 2 * tp
    fields = {
        "num_layers": layers,
        "hidden_size": 8 * heads,
        "num_attention_heads": heads,
        "ffn_hidden_size": 16 * heads,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": torch.distributed.get_backend() == "gloo",
        "masked_softmax_fusion": False,
        "pipeline_dtype": torch.float32,
        **fields,
    }
    if kind == "mtp":
        fields.setdefault("mtp_num_layers", 2)
        fields.setdefault("mtp_loss_scaling_factor", 0.1)  # no default up to 0.15
    fields.setdefault("sequence_parallel", tp > 1)
    if position == "mrope":
        fields.setdefault("mrope_section", [1, 1, 2])
    settings = TransformerConfig(**fields)
    if position == "yarn":  # fields that the config itself does not declare
        for name, value in {
            "rotary_scaling_factor": 4.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.0,
            "correction_range_round_to_int": True,
        }.items():
            setattr(settings, f"yarn_{name}", value)
    arguments: dict[str, Any] = {
        "vocab_size": -(-VOCAB // tp) * tp,
        "max_sequence_length": 128,
        "position_embedding_type": position,
        "scatter_embedding_sequence_parallel": scatter,
        "pre_process": pre_process,
        "post_process": post_process,
        **(model or {}),
    }
    if pg_collection is not None:
        arguments["pg_collection"] = pg_collection
    if kind == "hybrid":
        cls, name, stack = _hybrid()
        pattern = _first(cls, "hybrid_layer_pattern", "hybrid_override_pattern")
        arguments |= {name: _hybrid_spec(stack, attention), pattern: "*-" * (layers // 2)}
    else:
        cls = GPTModel
        layer = _normed(
            get_gpt_layer_local_spec(
                **({"num_experts": settings.num_moe_experts} if settings.num_moe_experts else {})
            ),
            attention,
        )
        arguments["transformer_layer_spec"] = TransformerBlockSubmodules(
            layer_specs=[layer] * _layers_here(settings), layer_norm=Norm
        )
        if kind == "mtp" and post_process:
            from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

            spec = get_gpt_mtp_block_spec(settings, layer, use_transformer_engine=False)
            arguments["mtp_block_spec"] = _normed(spec, attention)
    built = cls(settings, **arguments)
    return built.to(torch.cuda.current_device())


def pair(kind: str, **options: Any) -> tuple[Any, Any]:
    """Build a plain LM and a tower with the same weights; options as those of :func:`build`."""
    torch.manual_seed(1)
    plain, tower = (build(kind, scatter, **options) for scatter in (True, False))
    tower.load_state_dict(plain.state_dict())
    return plain, tower


def batch(length: int = 16, size: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Make random ``input_ids``, ``position_ids`` and ``labels``, int64 ``[size, length]``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (size, length + 1), generator=generator)
    ids = ids.to(torch.cuda.current_device())
    positions = torch.arange(length, device=ids.device).expand(size, length).contiguous()
    return {
        "input_ids": ids[:, :-1].contiguous(),
        "position_ids": positions,
        "labels": ids[:, 1:].contiguous(),
    }


def forward(model: Any, data: dict[str, Tensor], **more: Any) -> Any:
    """Run the model: the loss ``[b, s]`` if there are ``labels`` in the data, else the logits."""
    length = data["input_ids"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=data["input_ids"].device).triu(1)
    return model(**{"attention_mask": mask[None, None], **data, **more})


def step(
    model: Any,
    data: dict[str, Tensor],
    *,
    seed: int = 7,
    out: Optional[dict[str, Tensor]] = None,
    **more: Any,
) -> dict[str, Tensor]:
    """Run one training step.

    Args:
        model: as :func:`build` returns.
        data: as :func:`batch` returns.
        seed: of the random state before the forward.
        out: filled with the results, as far as the step came; a new one by default.
        more: more arguments of the model.

    Returns:
        dict: ``logits 0`` ``[s, b, vocab / tp]`` (and ``logits 1`` on, those of MTP), ``loss``
        ``[b, s]``, ``shard`` ``[s / tp, b, h]`` as the decoder gets it, sharing its storage, and
        under ``grad NAME`` the gradient of every parameter.
    """
    out = {} if out is None else out

    def keep_shard(_: Any, args: Any, kwargs: dict[str, Tensor]) -> None:
        out["shard"] = kwargs["hidden_states"].detach()

    def keep_logits(_: Any, args: Any, result: tuple[Tensor, Any]) -> None:
        depth = sum(name.startswith("logits") for name in out)
        out[f"logits {depth}"] = result[0].detach()

    hooks = [model.decoder.register_forward_pre_hook(keep_shard, with_kwargs=True)]
    if model.post_process:
        hooks.append(model.output_layer.register_forward_hook(keep_logits))
    model.zero_grad()
    try:
        seeded(seed)
        loss = forward(model, data, **more)
    finally:
        for hook in hooks:
            hook.remove()
    loss.float().mean().backward()
    out["loss"] = loss.detach()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            out[f"grad {name}"] = parameter.grad.clone()
    return out


def differences(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> list[str]:
    """Name the entries of two :func:`step` results that are not bitwise equal."""
    return [
        name
        for name in expected.keys() | actual.keys()
        if name not in actual
        or name not in expected
        or not torch.equal(expected[name], actual[name])
    ]


def seeded(seed: int) -> None:
    """Set this rank's random state, the model-parallel one included."""
    from megatron.core import tensor_parallel

    torch.manual_seed(seed)
    if torch.distributed.get_backend() == "nccl":
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _first(function: Any, *names: str) -> str:
    """The first of these parameters that a function has."""
    parameters = inspect.signature(function).parameters
    return next(name for name in names if name in parameters)


def _layers_here(config: TransformerConfig) -> int:
    stages = (config.pipeline_model_parallel_size or 1) * (
        config.virtual_pipeline_model_parallel_size or 1
    )
    return int(config.num_layers // stages)


def _hybrid() -> tuple[Any, str, Any]:
    """The hybrid model of this release, its spec's parameter and the module of its stack."""
    try:
        from megatron.core.models.hybrid import hybrid_block as block
        from megatron.core.models.hybrid.hybrid_model import HybridModel as Model
    except ImportError:  # up to 0.17
        from megatron.core.models.mamba.mamba_model import MambaModel as Model
        from megatron.core.ssm import mamba_block as block
    return Model, _first(Model, "hybrid_stack_spec", "mamba_stack_spec"), block


def _hybrid_spec(block: Any, attention: type) -> ModuleSpec:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.ssm.mlp_layer import MLPLayer

    hybrid = hasattr(block, "HybridStack")
    stack = block.HybridStack if hybrid else block.MambaStack
    submodules = block.HybridStackSubmodules if hybrid else block.MambaStackSubmodules
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=stack,
        # The final norm is Transformer Engine's.
        params={"post_layer_norm": False},
        submodules=submodules(
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=Norm,
                    self_attention=ModuleSpec(
                        module=SelfAttention,
                        params={"attn_mask_type": AttnMaskType.causal},
                        submodules=SelfAttentionSubmodules(
                            linear_qkv=ColumnParallelLinear,
                            core_attention=attention,
                            linear_proj=RowParallelLinear,
                        ),
                    ),
                    self_attn_bda=get_bias_dropout_add,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=Norm,
                    mlp=ModuleSpec(module=MLP, submodules=linears),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
        ),
    )


def _normed(spec: Any, attention: type) -> Any:
    """Put our norm and attention into a spec, at every depth."""
    if isinstance(spec, (list, tuple)):
        return type(spec)(_normed(item, attention) for item in spec)
    if isinstance(spec, ModuleSpec):
        return dataclasses.replace(spec, submodules=_normed(spec.submodules, attention))
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        changes = {}
        for field in dataclasses.fields(spec):
            value = getattr(spec, field.name)
            norm = field.name.endswith("norm") and value is not IdentityOp
            changes[field.name] = (
                Norm
                if norm
                else attention
                if field.name == "core_attention"
                else _normed(value, attention)
            )
        return dataclasses.replace(spec, **changes)
    return spec


def parameters(kind: str) -> set[str]:
    """Names of the parameters of the model's constructor and forward in this release."""
    cls = _hybrid()[0] if kind == "hybrid" else GPTModel
    return {*inspect.signature(cls).parameters, *inspect.signature(cls.forward).parameters}
