# SPDX-License-Identifier: Apache-2.0
"""Which language models in a built model are towers, and whether their decoders get shards."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple


class NotCoveredError(RuntimeError):
    """A tower's decoder would not get a shard, or that cannot be told; the message says which."""


class Tower(NamedTuple):
    """A language model: its name in what was built (``""`` if it is that itself) and its class.

    `verdict` is ``"covered"``, ``"not covered"``, ``"nothing to shard"`` or ``"cannot tell"``.
    """

    name: str
    cls: str
    verdict: str
    reason: str

    @property
    def covered(self) -> bool:
        """Whether it is known to run on shards, or has nothing to shard."""
        return self.verdict in ("covered", "nothing to shard")


def audit(model: Any, *, strict: bool = False) -> tuple[Tower, ...]:
    """List the language models in a built model, and whether a standalone forward is sharded.

    A tower's own forward runs up to its decoder, with stand-ins for its embedding (zeros
    ``[s, b, h]``) and its decoder: the rows that arrive are the verdict. So it judges the call
    sites, not what a custom embedding returns. No parameter, collective or random state is
    touched, and one rank may call it alone.

    Args:
        model: a ``torch.nn.Module``, wrapped or not, or a list, tuple or dict of them.
        strict: raise unless every tower is covered.

    Raises:
        TypeError: `model` is, or holds, something else.
        NotCoveredError: with `strict`, a tower is not covered, or it cannot be told.
    """
    from megatron.core.models.common.language_module.language_module import LanguageModule

    found = {  # by the module, which a model may hold under several names
        id(module): Tower(name, type(module).__name__, *_verdict(module))
        for name, module in _modules(model, "")
        if isinstance(module, LanguageModule) and hasattr(module, "decoder")
    }
    if strict and (missed := [tower for tower in found.values() if not tower.covered]):
        lines = [f"{t.name or 'the model'} ({t.cls}): {t.verdict}: {t.reason}" for t in missed]
        raise NotCoveredError("; ".join(lines))
    return tuple(found.values())


def _modules(model: Any, name: str) -> Iterator[tuple[str, Any]]:
    if hasattr(model, "named_modules"):
        yield from model.named_modules(prefix=name)
    elif isinstance(model, (list, tuple, Mapping)):
        for key, item in model.items() if isinstance(model, Mapping) else enumerate(model):
            yield from _modules(item, f"{name}.{key}".lstrip("."))
    else:
        raise TypeError(f"{name or 'the model'} is no torch.nn.Module, list or dict: {type(model)}")


def _verdict(tower: Any) -> tuple[str, str]:
    from .embedding import needs_shard, tp_group

    embedding = getattr(tower, "embedding", None)
    if getattr(embedding, "scatter_to_sequence_parallel", False):
        return "nothing to shard", "it is a plain LM: its embedding shards by itself"
    if not needs_shard(tower, embedding):
        return "nothing to shard", "sequence parallelism is off, TP is 1, or it does not embed"
    size = tp_group(tower, embedding).size()
    parts = ["its decoder"] if tower.pre_process else []
    parts += ["MTP's first layer"] if getattr(tower, "mtp_process", False) else []
    for part in parts:
        try:
            rows = _rows(tower, part, 4, 4 * size)
        except Exception as error:
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            return "cannot tell", f"{part} was not reached: {line}"
        if rows != 4:
            return "not covered", f"{part} gets {rows} of {4 * size} rows, not 4, at TP {size}"
    return "covered", f"{' and '.join(parts)} got this rank's rows"


def _rows(tower: Any, part: str, rows: int, length: int) -> int:
    """Run a part of a tower up to where hidden states arrive, and count their rows."""
    import inspect
    from unittest import mock

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "c10d" in func.namespace:
                raise RuntimeError(f"it calls {func}, for which all ranks are needed")
            return func(*args, **(kwargs or {}))

    class Arrived(BaseException):
        """Says how many rows did; no Exception, which a model's own code may catch."""

    def arrive(hidden_states: Any, *_: Any, **__: Any) -> None:
        raise Arrived(hidden_states.shape[0])

    class Embedding:
        """Returns zeros ``[s, b, h]``, but has the attributes of the tower's."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def __call__(self, *_: Any, **__: Any) -> Any:
            return zeros.clone()

    real, like = tower.embedding, next(tower.parameters())
    ids = torch.zeros((1, length), dtype=torch.long, device=like.device)
    zeros = ids.new_zeros((length, 1, tower.config.hidden_size), dtype=like.dtype)
    mrope = getattr(tower, "position_embedding_type", "") == "mrope"
    positions = ids.expand(3, 1, length) if mrope else ids
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "attention_mask": None}
    # Hooks of these packages gather parameters; other people's may hand in a decoder_input.
    homes = {str(hook.__module__).split(".")[0] for hook in tower._forward_pre_hooks.values()}
    run, ends = tower.forward if homes <= {"megatron", "torch"} else tower, [tower.decoder]
    if part != "its decoder":
        # Each of its layers begins with a norm of what it has embedded.
        run, ends = tower.mtp.forward, [layer.enorm for layer in tower.mtp.layers]
        inputs |= {"hidden_states": zeros[:rows], "embedding": Embedding()}
        inputs |= {"labels": ids} if "labels" in inspect.signature(run).parameters else {}  # 0.12
    # Language models inside of it, such as a distillation's teacher, are judged by themselves.
    stand_ins: Any = {m: {"forward": mock.Mock()} for m in tower.modules() if hasattr(m, "decoder")}
    stand_ins |= {m: {"forward": arrive, "_forward_pre_hooks": {}} for m in ends}
    # What these two methods set up for a training step would stay.
    setups = "preprocess_for_fine_grained_offloading", "preprocess_for_paged_stash"
    stand_ins[tower] = {"embedding": Embedding(), **dict.fromkeys(setups, mock.Mock())}
    with ExitStack() as stack:
        for module, attributes in stand_ins.items():
            # What stands in a module's `__dict__` is found before a submodule or a method.
            stack.enter_context(mock.patch.dict(module.__dict__, attributes))
        try:
            with torch.no_grad(), NoCollectives():  # type: ignore[no-untyped-call]
                run(**inputs)
        except Arrived as arrived:
            return int(arrived.args[0])
    raise RuntimeError("its forward ended without it")
