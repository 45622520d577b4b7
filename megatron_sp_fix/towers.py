# SPDX-License-Identifier: Apache-2.0
"""Which language models in a built model are towers, and whether their decoders get shards."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

__all__ = ["NotCoveredError", "Tower", "audit"]


class NotCoveredError(RuntimeError):
    """A tower's decoder would not get a shard, or that cannot be told; the message says which."""


class Tower(NamedTuple):
    """A language model found in a model.

    Attributes:
        name: its name in the model, ``""`` for the model itself.
        cls: its class.
        verdict: ``"covered"``, ``"not covered"``, ``"nothing to shard"`` or ``"cannot tell"``.
        reason: why, in a sentence.
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
        TypeError: there is no module in `model`.
        NotCoveredError: with `strict`, a tower is not covered, or it cannot be told.
    """
    from megatron.core.models.common.language_module.language_module import LanguageModule

    towers, seen = [], set()
    for name, module in _modules(model, ""):
        if isinstance(module, LanguageModule) and hasattr(module, "decoder"):
            if id(module) not in seen:
                towers.append(Tower(name, type(module).__name__, *_verdict(module)))
            seen.add(id(module))
    missed = [tower for tower in towers if not tower.covered]
    if strict and missed:
        raise NotCoveredError(
            "; ".join(f"{t.name or 'the model'} ({t.cls}): {t.verdict}: {t.reason}" for t in missed)
        )
    return tuple(towers)


def _modules(model: Any, name: str) -> Iterator[tuple[str, Any]]:
    import torch

    if isinstance(model, torch.nn.Module):
        yield from model.named_modules(prefix=name)
    elif isinstance(model, (list, tuple, Mapping)):
        items = model.items() if isinstance(model, Mapping) else enumerate(model)
        for key, item in items:
            yield from _modules(item, f"{name}.{key}".lstrip("."))
    else:
        raise TypeError(
            f"audit takes a torch.nn.Module, or a list or dict of them, not {type(model).__name__}"
        )


def _verdict(tower: Any) -> tuple[str, str]:
    from .embedding import needs_shard, tp_group

    embedding = getattr(tower, "embedding", None)
    if embedding is None:
        return "nothing to shard", "this stage does not embed"
    if getattr(embedding, "scatter_to_sequence_parallel", False):
        return "nothing to shard", "it is a plain LM: its embedding shards by itself"
    if not needs_shard(tower, embedding):
        return "nothing to shard", "sequence parallelism is off, or TP is 1"
    probe = _Probe(tower, tp_group(tower, embedding))
    parts = [("its decoder", probe.decoder)] if tower.pre_process else []
    if getattr(tower, "mtp_process", False):
        parts.append(("MTP", probe.mtp))
    for name, run in parts:
        try:
            rows = probe.rows_of(run)
        except Exception as error:
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            return "cannot tell", f"{name} was not reached: {line}"
        if rows != probe.rows:
            expected = f"{probe.rows} of {probe.length} rows"
            return "not covered", f"{name} gets {rows} instead of {expected} at TP {probe.size}"
    return "covered", f"{' and '.join(name for name, _ in parts)} got this rank's rows"


class _Arrived(BaseException):
    """Holds what arrived at a stand-in; no Exception, which a model's own code may catch."""


class _StandIn:
    """Does something of its own when called; its attributes are those of what it stands in for."""

    def __init__(self, real: Any, call: Callable[..., Any], **own: Any) -> None:
        self.__dict__.update(own, _real=real, _call=call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


class _Probe:
    """Calls a tower's methods with stand-ins, and counts the rows that arrive."""

    def __init__(self, tower: Any, group: Any) -> None:
        import torch

        self.tower, self.size = tower, group.size()
        self.rows, self.length = 4, 4 * group.size()
        like = next(tower.parameters())
        shape, hidden = (1, self.length), tower.config.hidden_size

        def embed(*_: Any, **__: Any) -> Any:
            return like.new_zeros(self.length, 1, hidden)

        self.embedding = _StandIn(
            tower.embedding, embed, tp_group=group, scatter_to_sequence_parallel=False
        )
        positions = torch.arange(self.length, device=like.device).expand(shape)
        if getattr(tower, "position_embedding_type", "") == "mrope":
            positions = positions.expand(3, *shape)
        ids = torch.zeros(shape, dtype=torch.long, device=like.device)
        self.inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": None}
        self.hidden_states = like.new_zeros(self.rows, 1, hidden)

    def decoder(self) -> None:
        """Call the tower's forward."""
        tower, decoder = self.tower, _StandIn(self.tower.decoder, _arrived)
        with _instead(tower, "embedding", self.embedding), _instead(tower, "decoder", decoder):
            hooks = tower._forward_pre_hooks.values()
            home = {str(getattr(hook, "__module__", "")).split(".")[0] for hook in hooks}
            # Hooks of these gather parameters; others may hand in a decoder_input.
            (tower.forward if home <= {"megatron", "torch"} else tower)(**self.inputs)

    def mtp(self) -> None:
        """Call the forward of the tower's MTP block, whose layers norm what they embed."""
        import inspect

        block = self.tower.mtp
        given = self.inputs | {"hidden_states": self.hidden_states, "embedding": self.embedding}
        for name, parameter in inspect.signature(block.forward).parameters.items():
            if name not in given and parameter.default is parameter.empty:
                given |= {} if parameter.kind is parameter.VAR_KEYWORD else {name: None}
        with ExitStack() as stack:
            for layer in block.layers:
                stack.enter_context(_instead(layer, "enorm", _StandIn(layer.enorm, _arrived)))
            block.forward(**given)

    def rows_of(self, run: Callable[[], None]) -> int:
        """Run a method up to a stand-in, without collectives or gradients."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        class NoCollectives(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
                if "c10d" in func.namespace:
                    raise RuntimeError(f"it calls {func}, for which all ranks are needed")
                return func(*args, **(kwargs or {}))

        try:
            with torch.no_grad(), NoCollectives():
                run()
        except _Arrived as arrived:
            rows: int = arrived.args[0].shape[0]
            return rows
        raise RuntimeError("its forward ended without it")


def _arrived(*args: Any, **kwargs: Any) -> None:
    states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    raise _Arrived(states.unwrap() if hasattr(states, "unwrap") else states)


@contextmanager
def _instead(module: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Shadow an attribute of a module by its ``__dict__``, as embedding.py does."""
    before = module.__dict__.get(name, stand_in)
    module.__dict__[name] = stand_in
    try:
        yield
    finally:
        module.__dict__[name] = before
        if before is stand_in:
            del module.__dict__[name]
