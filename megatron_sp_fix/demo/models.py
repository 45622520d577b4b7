# SPDX-License-Identifier: Apache-2.0
"""Small real megatron-core models, alike in every supported release: a plain LM and its tower.

Built from megatron-core's local layers, so that they run on CPU ranks without Transformer Engine.
"""

import dataclasses
from typing import Any, Optional

import torch
from torch import Tensor

from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

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
        """Attend: ``[s, b, heads, d]``, of key and value fewer heads, to ``[s, b, heads * d]``."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def build(
    kind: str,
    scatter: bool,
    *,
    position: Optional[str] = None,
    attention: type = Attention,
    layers: int = 2,
    config: Optional[dict[str, Any]] = None,
    model: Optional[dict[str, Any]] = None,
) -> Any:
    """Build a ``GPTModel``, ``HybridModel`` or ``MambaModel`` in float32 on this rank's device.

    Args:
        kind: ``"gpt"``, ``"hybrid"`` or ``"mtp"``.
        scatter: True for a plain LM, False for a tower.
        position: ``position_embedding_type``; by default ``"none"`` for a hybrid, else ``"rope"``.
        attention: the core attention's class.
        layers: transformer layers on this rank.
        config: more fields of ``TransformerConfig``.
        model: more arguments of the model.
    """
    tp = parallel_state.get_tensor_model_parallel_world_size()
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
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        # The second has no default up to 0.15.
        **({"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.1} if kind == "mtp" else {}),
        **(config or {}),
    }
    fields = TransformerConfig(**settings)
    arguments = {
        "vocab_size": -(-VOCAB // tp) * tp,
        "max_sequence_length": 128,
        "position_embedding_type": position or ("none" if kind == "hybrid" else "rope"),
        "scatter_embedding_sequence_parallel": scatter,
        **(model or {}),
    }
    layer = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=fields.num_moe_experts)
    layer = local(layer, attention)
    if kind == "hybrid":
        cls, spec = hybrid(layer)
        new = cls.__name__ == "HybridModel"
        arguments["hybrid_layer_pattern" if new else "hybrid_override_pattern"] = "*" * layers
    else:
        cls, spec = GPTModel, TransformerBlockSubmodules([layer] * layers, Norm)
    if kind == "mtp" and arguments.get("post_process", True):
        mtp = gpt_layer_specs.get_gpt_mtp_block_spec(fields, layer, use_transformer_engine=False)
        arguments["mtp_block_spec"] = local(mtp, attention)
    return cls(fields, spec, **arguments).to(torch.cuda.current_device())


def local(spec: Any, attention: type) -> Any:
    """Put :class:`Norm` and an attention class into a spec, at every depth."""
    if isinstance(spec, (list, tuple)):
        return type(spec)(local(item, attention) for item in spec)
    if not dataclasses.is_dataclass(spec) or isinstance(spec, type):
        return spec
    changes: dict[str, Any] = {}
    for name, value in vars(spec).items():
        changes[name] = attention if name == "core_attention" else local(value, attention)
        if name.endswith("norm") and value is not IdentityOp:
            changes[name] = Norm
    return dataclasses.replace(spec, **changes)


def hybrid(layer: Any) -> tuple[Any, ModuleSpec]:
    """Return the class of this release's hybrid model, and its stack's spec with these layers."""
    without = {"post_layer_norm": False}  # the final norm could only be Transformer Engine's
    try:
        from megatron.core.models.hybrid import hybrid_block, hybrid_model
    except ImportError:  # up to 0.17
        from megatron.core.models.mamba.mamba_model import MambaModel
        from megatron.core.ssm import mamba_block as old

        layers = old.MambaStackSubmodules(attention_layer=layer)
        return MambaModel, ModuleSpec(old.MambaStack, without, layers)
    layers = hybrid_block.HybridStackSubmodules(attention_layer=layer)
    return hybrid_model.HybridModel, ModuleSpec(hybrid_block.HybridStack, without, layers)


def pair(kind: str, **options: Any) -> tuple[Any, Any]:
    """Build a plain LM and a tower with the same weights; options as those of :func:`build`."""
    seeded(1)
    plain, tower = (build(kind, scatter, **options) for scatter in (True, False))
    tower.load_state_dict(plain.state_dict())
    return plain, tower


def batch(
    length: int = 16, size: int = 2, seed: int = 0, vocabulary: int = VOCAB
) -> dict[str, Tensor]:
    """Make random ``input_ids``, ``position_ids`` and ``labels``, int64 ``[size, length]``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (size, length + 1), generator=generator)
    tensors = (ids[:, :-1], torch.arange(length).expand(size, length), ids[:, 1:])
    there = (tensor.contiguous().to(torch.cuda.current_device()) for tensor in tensors)
    return dict(zip(("input_ids", "position_ids", "labels"), there))


def forward(model: Any, data: dict[str, Tensor], **more: Any) -> Any:
    """Run the model: the loss ``[b, s]`` if there are ``labels`` in the data, else the logits."""
    length = data["input_ids"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=data["input_ids"].device).triu(1)
    return model(**{"attention_mask": mask[None, None], **data, **more})


def seeded(seed: int) -> None:
    """Set this rank's random state, the model-parallel one included."""
    torch.manual_seed(seed)
    if torch.distributed.get_backend() == "nccl":
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def step(
    model: Any,
    data: dict[str, Tensor],
    *,
    seed: int = 7,
    out: Optional[dict[str, Tensor]] = None,
    **more: Any,
) -> dict[str, Tensor]:
    """Run one training step, with random state from a seed and more arguments for the model.

    Returns:
        dict: ``logits 0`` ``[s, b, vocab / tp]`` (and ``logits 1`` on, those of MTP), ``loss``
        ``[b, s]``, ``shard`` ``[s / tp, b, h]`` as the decoder gets it, sharing its storage, and
        under ``grad NAME`` the gradient of every parameter. It is `out`, if that was given: a step
        that raises has filled it as far as it came.
    """
    out = {} if out is None else out

    def keep_shard(_: Any, args: Any, kwargs: dict[str, Tensor]) -> None:
        out["shard"] = kwargs["hidden_states"].detach()

    def keep_logits(_: Any, args: Any, result: tuple[Tensor, Any]) -> None:
        out[f"logits {sum(name.startswith('logits') for name in out)}"] = result[0].detach()

    hooks = [model.decoder.register_forward_pre_hook(keep_shard, with_kwargs=True)]
    if model.post_process:
        hooks.append(model.output_layer.register_forward_hook(keep_logits))
    model.zero_grad()
    seeded(seed)
    try:
        loss = forward(model, data, **more)
    finally:
        for hook in hooks:
            hook.remove()
    loss.float().mean().backward()
    out["loss"] = loss.detach()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    out |= {f"grad {name}": grad.clone() for name, grad in grads.items() if grad is not None}
    return out


def differences(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> list[str]:
    """Name the entries of two :func:`step` results that are not bitwise equal."""
    both = expected.keys() & actual.keys()
    same = {name for name in both if torch.equal(expected[name], actual[name])}
    return sorted((expected.keys() | actual.keys()) - same)
