# SPDX-License-Identifier: Apache-2.0
"""Let a language tower that embeds its own tokens be a plain LM for that one call.

A tower is built with ``scatter_embedding_sequence_parallel=False``, since an outer model merges in
image or audio embeddings and shards for sequence parallelism (SP) itself. When it embeds its own
tokens nobody shards. Here its method runs as it is, with a :class:`Sharding` as the embedding.
"""

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region

# Release 0.12 takes no group and uses the global one.
_TAKES_GROUP = "group" in inspect.signature(scatter_to_sequence_parallel_region).parameters


def tp_group(owner: Any, embedding: Any) -> Any:
    """The group that splits the vocabulary: the embedding's own, its owner's or the global one."""
    collection = getattr(owner, "pg_collection", None) or getattr(owner, "model_comm_pgs", None)
    for holder, name in ((embedding, "tp_group"), (collection, "tp"), (owner, "tp_group")):
        if (group := getattr(holder, name, None)) is not None:
            return group
    return parallel_state.get_tensor_model_parallel_group()


def needs_shard(owner: Any, embedding: Any) -> bool:
    """Whether SP is on, TP above 1, and the embedding (None: not on this stage) does not shard."""
    return (
        owner.config.sequence_parallel
        and embedding is not None
        and not getattr(embedding, "scatter_to_sequence_parallel", False)
        and tp_group(owner, embedding).size() > 1
    )


def sharding(model: Any, call: Callable[[], Any], context: Any, native: str) -> Any:
    """Run a model's method while ``model.embedding``, which needs it, is a :class:`Sharding`.

    Args:
        model: a ``GPTModel``, ``HybridModel`` or ``MambaModel``, or of a subclass.
        call: runs the original method, whose result is returned.
        context: a ``BaseInferenceContext`` or None; with fp8 or fp4, its padding rows are zeroed.
        native: ``sites.Site.native``; empty for a method of `also`, which may embed more than once.
    """
    mine = Sharding(model.embedding, tp_group(model, model.embedding), once=bool(native))
    quantized = getattr(model.config, "fp8", None) or getattr(model.config, "fp4", None)
    if quantized and context is not None and context.is_dynamic_batching():
        mine._sp_active = context.active_token_count
    # Python finds this first: for a submodule it has to ask `nn.Module.__getattr__`.
    before = model.__dict__.get("embedding", mine)
    model.__dict__["embedding"] = mine
    try:
        if native != "own scatter" and model.embedding is not mine:
            raise TypeError(f"{type(model).__name__}.embedding is a property: make it a submodule")
        return call()
    finally:
        mine.scatter_to_sequence_parallel = False  # whoever kept it gets all rows, and shards
        if model.__dict__.get("embedding") is mine:  # else somebody assigned another, which stays
            model.__dict__["embedding"] = before
            if before is mine:
                del model.__dict__["embedding"]


def sharding_rows(owner: Any, embedding: Any, hidden_states: Any) -> Any:
    """The embedding that gives an MTP layer as many rows as it has hidden states ``[s, b, h]``."""
    if type(embedding) is Sharding:  # of the model, or of the method that called this one
        embedding = embedding._sp_real
    if not needs_shard(owner, embedding):
        return embedding
    return Sharding(embedding, tp_group(owner, embedding), hidden_states.shape[0])


class Sharding:
    """Stands in for an embedding, for all calls or `once`; returns `rows` rows (0: ``s / tp``)."""

    scatter_to_sequence_parallel = True  # False tells a caller to shard; some callers set it
    _sp_real: Any = None  # torch.compile reads `__class__` before `__init__` has run
    _sp_active: Any = None  # tokens in a quantized batch
    _sp_done = False

    def __init__(self, embedding: Any, group: Any, rows: int = 0, once: bool = False) -> None:
        self._sp_group, self._sp_rows, self._sp_once = group, rows, once
        # Somebody may have assigned `model.embedding` to itself while a stand-in was there.
        self._sp_real = embedding._sp_real if type(embedding) is Sharding else embedding

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sp_real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name == "scatter_to_sequence_parallel" or name.startswith("_sp_")
        object.__setattr__(self, name, value) if own else setattr(self._sp_real, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # what isinstance() asks
        return type(self._sp_real)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Embed ids int64 ``[b, s, ...]`` as a shard ``[s / tp, b, h]``, or raise a ValueError."""
        embedding, size = self._sp_real, self._sp_group.size()
        ids: Any = kwargs.get("input_ids", args[0] if args else None)
        length = ids.shape[1] if getattr(ids, "ndim", 0) >= 2 else 0  # 0: not known
        rows = self._sp_rows or length // size
        if rows == length > 0 or self._sp_done or not self.scatter_to_sequence_parallel:
            self.scatter_to_sequence_parallel &= not self._sp_done  # tells callers to shard
            return embedding(*args, **kwargs)
        self._sp_done = self._sp_once
        if stock := _runs(LanguageModelEmbedding, embedding):
            _check_divides(length, size)
        flags = _scatter_flags(embedding) if stock else []
        before = [getattr(module, name) for module, name in flags]
        try:
            for module, name in flags:
                setattr(module, name, True)
            output = embedding(*args, **kwargs)
        finally:
            for (module, name), value in zip(flags, before):
                setattr(module, name, value)
        if stock and output.shape[0] not in (rows, length):
            raise ValueError(
                f"the embedding returned {output.shape[0]} rows of {length} tokens, not {rows}, at "
                f"tensor parallel size {size}: let nothing inside of its call shard or add rows"
            )
        declares = hasattr(embedding, "scatter_to_sequence_parallel")
        if output.shape[0] == length or (output.shape[0] != rows and declares):
            _check_divides(output.shape[0], size)
            where = {"group": self._sp_group} if _TAKES_GROUP else {}
            output = scatter_to_sequence_parallel_region(output, **where)
        if output.untyped_storage().size() > output.numel() * output.element_size():
            output = output.clone()  # a view would keep the full-length tensor alive
        if self._sp_active is not None:
            # megatron-core counts padding rows from the start of the whole sequence.
            output[max(self._sp_active - self._sp_group.rank() * output.shape[0], 0) :] = 0.0
        return output

    forward = __call__


def _runs(cls: type, module: Any) -> bool:
    """Whether the module's class runs megatron-core's own forward of `cls`."""
    # Its instance may have a timer on one rank, but ranks must agree on the collective.
    forward: Any = getattr(type(module), "forward", None) if issubclass(type(module), cls) else None
    home = ""
    while type(forward) is FunctionType:
        home = forward.__globals__.get("__name__", "")  # a decorator copies `__module__`
        forward = forward.__dict__.get("__wrapped__") if home.startswith("megatron.core.") else None
    return home == cls.__module__


def _check_divides(length: int, size: int) -> None:
    if length % size:
        raise ValueError(
            f"sequence length {length} is not divisible by the tensor parallel size {size}: pad it "
            f"to {-(-length // size) * size} tokens, or set sequence_parallel=False"
        )


def _scatter_flags(embedding: Any) -> list[tuple[Any, str]]:
    """The flags to set. In a reduce-scatter, `scatter_to_sequence_parallel` would only clone."""
    words = embedding.word_embeddings
    plain = not embedding.add_position_embedding and embedding.num_tokentypes <= 0
    if plain and _runs(VocabParallelEmbedding, words):
        return [(words, "reduce_scatter_embeddings"), (embedding, "reduce_scatter_embeddings")]
    return [(embedding, "scatter_to_sequence_parallel")]
