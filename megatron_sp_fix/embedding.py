# SPDX-License-Identifier: Apache-2.0
"""Embed tokens for a decoder that runs under sequence parallelism (SP).

A multimodal model builds its language model ("tower") with
``scatter_embedding_sequence_parallel=False``: it calls ``tower.embedding`` itself, merges image or
audio features into the full-length result, shards that and passes it on as ``decoder_input``. When
the tower embeds its own tokens instead, nobody shards. These functions do, at the place where a
model embeds tokens for its decoder. Called by anyone else, the embedding still returns full length.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

__all__ = ["embed_for_decoder", "needs_shard", "shard_padding_mask", "sharding_embedding"]


def needs_shard(owner: Any, embedding: Any) -> bool:
    """Whether SP is on and the embedding does not declare that it shards by itself.

    Args:
        owner: the model or MTP layer that embeds; its ``config`` is read.
        embedding: a ``LanguageModelEmbedding``, or any callable that stands in for one.

    Returns:
        bool: False for TP size 1, while SP is off, and for an embedding that was built to scatter.
    """
    return (
        owner.config.sequence_parallel
        # One that declares nothing (a bare function) is called, and its output's length decides.
        and not getattr(embedding, "scatter_to_sequence_parallel", False)
        and _tp_group(owner, embedding).size() > 1
    )


def embed_for_decoder(
    model: Any, input_ids: Tensor, position_ids: Optional[Tensor], inference_context: Any = None
) -> Tensor:
    """Embed ``input_ids`` into what ``model.decoder`` takes: under SP a shard, else all of it.

    Follows ``GPTModel._preprocess`` and ``HybridModel.forward``. The logits, loss and gradients are
    those of a model built with ``scatter_embedding_sequence_parallel=True``.

    Args:
        model: a ``GPTModel``, ``HybridModel`` or ``MambaModel`` that embeds on this stage.
        input_ids: token ids, int64 ``[b, s]``, the same on every rank of the TP group.
        position_ids: int64 ``[b, s]``; passed to the embedding unread.
        inference_context: a ``BaseInferenceContext``. Under dynamic batching with fp8 or fp4 the
            padding rows are zeroed, wherever in the sequence this rank's rows are, so that they do
            not enter a quantization scale.

    Returns:
        Tensor: ``[s / tp, b, h]`` that owns its storage, in the embedding's dtype; ``[s, b, h]``
        when there is nothing to shard.

    Raises:
        ValueError: the TP size does not divide ``s`` (raised before any collective), or the
            embedding returned neither ``s`` nor ``s / tp`` rows, as one does that a hook shards
            once more.
    """
    embedding = model.embedding
    if not needs_shard(model, embedding):
        full: Tensor = embedding(input_ids=input_ids, position_ids=position_ids)
        return full
    group = _tp_group(model, embedding)
    shard = _embed(embedding, group, input_ids=input_ids, position_ids=position_ids)
    if (
        inference_context is not None
        and inference_context.is_dynamic_batching()
        and (getattr(model.config, "fp8", None) or getattr(model.config, "fp4", None))
    ):
        # Padding is what follows in the whole sequence, of which this shard begins at `offset`.
        # (The context's `padding_slice` says the same, from 0.16 on.)
        offset = group.rank() * shard.shape[0]
        shard[max(inference_context.active_token_count - offset, 0) :] = 0.0
    return shard


def sharding_embedding(owner: Any, embedding: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return ``embedding``, or a callable in its place that returns shards.

    For code that is handed an embedding to call: ``MultiTokenPredictionLayer._get_embeddings`` and
    ``forward_single_position``.

    Args:
        owner: the MTP layer or block; its ``config`` and TP group are read.
        embedding: called with keywords ``input_ids`` and ``position_ids``, int64 ``[b, s]``.

    Returns:
        Callable: returns ``[s / tp, b, h]`` and raises as :func:`embed_for_decoder` does, if the
        embedding needs it; otherwise ``embedding`` itself.
    """
    if not needs_shard(owner, embedding):
        return embedding
    return partial(_embed, embedding, _tp_group(owner, embedding))


def shard_padding_mask(model: Any, padding_mask: Tensor, input_ids: Tensor) -> Tensor:
    """Take this rank's part of a padding mask, along the sequence, over the model's TP group.

    Args:
        model: the model that embeds; under SP with a TP size above 1.
        padding_mask: bool ``[b, s]``, True at padding.
        input_ids: token ids ``[b, s]``.

    Returns:
        Tensor: bool ``[b, s / tp]``, contiguous. A mask that has this shape already is returned
        as it came.

    Raises:
        ValueError: the mask has another shape.
    """
    group = _tp_group(model, model.embedding)
    batch, length = input_ids.shape
    if padding_mask.shape == (batch, length // group.size()):
        return padding_mask
    if padding_mask.shape != input_ids.shape:
        raise ValueError(
            f"padding_mask has shape {tuple(padding_mask.shape)}, which does not match "
            f"input_ids of shape {tuple(input_ids.shape)} at tensor parallel size {group.size()}"
        )
    mine: Tensor = padding_mask.chunk(group.size(), dim=1)[group.rank()]
    return mine.contiguous()


def _tp_group(owner: Any, embedding: Any) -> Any:
    """The group that splits the embedding's vocabulary: its own, its owner's or the global one."""
    for holder, name in (
        (embedding, "tp_group"),
        (getattr(owner, "pg_collection", None), "tp"),
        (owner, "tp_group"),
    ):
        group = getattr(holder, name, None)
        if group is not None:
            return group
    return parallel_state.get_tensor_model_parallel_group()


def _embed(
    embedding: Callable[..., Tensor],
    group: Any,
    *,
    input_ids: Tensor,
    position_ids: Optional[Tensor],
) -> Tensor:
    """Call the embedding and return this rank's shard, whoever does the sharding."""
    length, size = input_ids.shape[1], group.size()
    if length % size != 0:
        raise ValueError(
            f"sequence length {length} is not divisible by the tensor parallel size {size}, which "
            f"sequence parallelism needs: pad the sequence to {-(-length // size) * size} tokens, "
            "or set sequence_parallel=False"
        )
    if _is_stock(embedding, LanguageModelEmbedding):
        output = _embed_scattered(embedding, input_ids, position_ids)
    else:
        output = embedding(input_ids=input_ids, position_ids=position_ids)
    if output.shape[0] == length:
        taken: Tensor = _TakeShard.apply(output, group)  # type: ignore[no-untyped-call]
        return taken
    if output.shape[0] != length // size:
        raise ValueError(
            f"the embedding returned shape {tuple(output.shape)} for input_ids of shape "
            f"{tuple(input_ids.shape)}: its first dimension must be the sequence length {length}, "
            f"or {length // size} if it shards for tensor parallel size {size} by itself; a hook "
            "must not shard, since it is given what the decoder gets"
        )
    if output.untyped_storage().nbytes() != output.numel() * output.element_size():
        output = output.clone()  # a view of somebody's full-length tensor
    return output


def _is_stock(module: Any, cls: type[torch.nn.Module]) -> bool:
    """Whether calling the module runs the forward of ``cls``.

    Decided by code alone, never by hooks: TP ranks must agree on the collective, and one of them
    may log through a hook. The type is read, not ``isinstance``: a proxy may answer for another's.
    """
    return (
        getattr(type(module), "forward", None) is cls.forward
        and type(module).__call__ is cls.__call__
        and "forward" not in module.__dict__
        and getattr(module, "_compiled_call_impl", None) is None
    )


def _embed_scattered(
    embedding: LanguageModelEmbedding, input_ids: Tensor, position_ids: Optional[Tensor]
) -> Tensor:
    """Run a stock embedding as one does that was built to scatter."""
    words = embedding.word_embeddings
    reduce_scatter = (
        not embedding.add_position_embedding
        and embedding.num_tokentypes <= 0
        and _is_stock(words, VocabParallelEmbedding)
    )
    if reduce_scatter:
        words = _twin(words, reduce_scatter_embeddings=True)
    scattering = _twin(
        embedding,
        # With both flags True it would also clone the shard, which the reduce-scatter's output, no
        # view of anything, does not need.
        scatter_to_sequence_parallel=not reduce_scatter,
        reduce_scatter_embeddings=reduce_scatter,
        _modules={**embedding._modules, "word_embeddings": words},
    )
    output: Tensor = scattering(input_ids=input_ids, position_ids=position_ids)
    return output


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _twin(module: torch.nn.Module, **changes: Any) -> Any:
    """Copy a module with some attributes changed; it shares the parameters.

    The module itself keeps its attributes, since another thread may be calling it. Its hooks run,
    and are given the module, not the twin, which torch's global hooks are given.
    """
    kept = (*changes, *_HOOKS)
    for name in _HOOKS:
        hooks = module.__dict__[name]
        if hooks:
            # By the same keys, which torch also looks up in the dicts of the hooks' options.
            bound = ((key, partial(_call_hook, hook, module, kept)) for key, hook in hooks.items())
            changes[name] = type(hooks)(bound)
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__, **changes)
    return twin


def _call_hook(
    hook: Callable[..., Any], module: torch.nn.Module, kept: tuple[str, ...], twin: Any, *rest: Any
) -> Any:
    result = hook(module, *rest)
    # A hook may assign to the module, as those of `torch.nn.utils.prune` do: the weight to use.
    now = module.__dict__.copy()
    for name in kept:
        now.pop(name, None)
    twin.__dict__.update(now)
    return result


class _TakeShard(torch.autograd.Function):
    """This rank's rows of a full-length tensor, copied: a slice would keep all of it alive."""

    @staticmethod
    def forward(ctx: Any, full: Tensor, group: Any) -> Tensor:
        """Copy ``[s / tp, b, h]`` out of ``[s, b, h]``."""
        ctx.group = group
        shard: Tensor = full.chunk(group.size())[group.rank()]
        return shard.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Gather every rank's ``[s / tp, b, h]``: each computed its own rows alone."""
        return gather_from_sequence_parallel_region(grad, group=ctx.group), None
