# SPDX-License-Identifier: Apache-2.0
"""Small real megatron-core models, alike in every supported release: a plain LM and its tower.

Built from megatron-core's local layers, so that they run on CPU ranks without Transformer Engine.
"""

import dataclasses
import inspect
from typing import Any, Optional

import torch
from torch import Tensor

from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

KINDS = ("gpt", "hybrid", "mtp")
VOCAB = 64


class Norm(torch.nn.LayerNorm):
    """A layer norm for the local layers: torch's, with the mark that SP needs on its weights."""

    def __init__(self, config: TransformerConfig, hidden_size: int, **_: Any) -> None:
        super().__init__(hidden_size, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[s, b, h]`` in the parameters' dtype: the residual may be float32."""
        return super().forward(x.to(self.weight.dtype))


class Attention(torch.nn.Module):
    """Causal attention without a mask, so that a sequence of the wrong length gets through it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attend: three times ``[s, b, heads, d]`` to ``[s, b, heads * d]``."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def build(
    kind: str,
    scatter: bool,
    *,
    cls: Any = GPTModel,
    position: Optional[str] = None,
    attention: type = Attention,
    layers: int = 2,
    config: Optional[dict[str, Any]] = None,
    model: Optional[dict[str, Any]] = None,
) -> Any:
    """Build a model.

    Args:
        kind: one of :data:`KINDS`.
        scatter: True for a plain LM, False for a tower.
        cls: the class of a model that is no hybrid.
        position: ``position_embedding_type``; by default ``"none"`` for a hybrid, else ``"rope"``.
        attention: the core attention's class.
        layers: transformer layers on this rank.
        config: more fields of ``TransformerConfig``.
        model: more arguments of the model.

    Returns:
        A ``GPTModel``, ``HybridModel`` or ``MambaModel`` in float32 on this rank's device.
    """
    more, tp = config or {}, parallel_state.get_tensor_model_parallel_world_size()
    heads = 4 if 4 % tp == 0 else 2 * tp
    settings = {
        "num_layers": layers,
        "hidden_size": 8 * heads,
        "num_attention_heads": heads,
        "ffn_hidden_size": 16 * heads,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": torch.distributed.get_backend() == "gloo",
        "masked_softmax_fusion": False,
        "pipeline_dtype": torch.float32,
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        # The second has no default up to 0.15.
        **({"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.1} if kind == "mtp" else {}),
        **more,
    }
    fields = TransformerConfig(**settings)
    arguments = {
        "vocab_size": -(-VOCAB // tp) * tp,
        "max_sequence_length": 128,
        "position_embedding_type": position or ("none" if kind == "hybrid" else "rope"),
        "scatter_embedding_sequence_parallel": scatter,
        **(model or {}),
    }
    layer = local(
        gpt_layer_specs.get_gpt_layer_local_spec(num_experts=fields.num_moe_experts), attention
    )
    if kind == "hybrid":
        cls, stack = hybrid(layer)
        arguments[parameter(cls, "hybrid_stack_spec", "mamba_stack_spec")] = stack
        arguments[parameter(cls, "hybrid_layer_pattern", "hybrid_override_pattern")] = "*" * layers
    else:
        arguments["transformer_layer_spec"] = TransformerBlockSubmodules([layer] * layers, Norm)
    if kind == "mtp" and arguments.get("post_process", True):
        spec = gpt_layer_specs.get_gpt_mtp_block_spec(fields, layer, use_transformer_engine=False)
        arguments["mtp_block_spec"] = local(spec, attention)
    return cls(fields, **arguments).to(torch.cuda.current_device())


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
        if not (name in actual and name in expected and torch.equal(expected[name], actual[name]))
    ]


def seeded(seed: int) -> None:
    """Set this rank's random state, the model-parallel one included."""
    torch.manual_seed(seed)
    if torch.distributed.get_backend() == "nccl":
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def local(spec: Any, attention: type) -> Any:
    """Put :class:`Norm` and an attention class into a spec, at every depth."""
    if isinstance(spec, (list, tuple)):
        return type(spec)(local(item, attention) for item in spec)
    if isinstance(spec, ModuleSpec):
        return dataclasses.replace(spec, submodules=local(spec.submodules, attention))
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        changes = {}
        for field in dataclasses.fields(spec):
            value = getattr(spec, field.name)
            if field.name.endswith("norm") and value is not IdentityOp:
                changes[field.name] = Norm
            else:
                own = field.name == "core_attention"
                changes[field.name] = attention if own else local(value, attention)
        return dataclasses.replace(spec, **changes)
    return spec


def hybrid(layer: ModuleSpec) -> tuple[Any, ModuleSpec]:
    """Return the class of this release's hybrid model, and its stack's spec with these layers."""
    cls: Any
    try:
        from megatron.core.models.hybrid.hybrid_block import HybridStack as Stack
        from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules as Submodules
        from megatron.core.models.hybrid.hybrid_model import HybridModel as cls
    except ImportError:  # up to 0.17
        from megatron.core.models.mamba.mamba_model import MambaModel as cls
        from megatron.core.ssm.mamba_block import MambaStack as Stack
        from megatron.core.ssm.mamba_block import MambaStackSubmodules as Submodules
    # Its final norm could only be Transformer Engine's.
    return cls, ModuleSpec(Stack, {"post_layer_norm": False}, Submodules(attention_layer=layer))


def parameter(function: Any, *names: str) -> str:
    """Return the first of these parameters that a function has in this release."""
    parameters = inspect.signature(function).parameters
    return next(name for name in names if name in parameters)
