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
        TypeError: `model` is, or holds, something else.
        NotCoveredError: with `strict`, a tower is not covered, or it cannot be told.
    """
    from megatron.core.models.common.language_module.language_module import LanguageModule

    found = {
        id(module): (name, module)
        for name, module in _modules(model, "")
        if isinstance(module, LanguageModule) and hasattr(module, "decoder")
    }
    towers = tuple(Tower(name, type(m).__name__, *_verdict(m)) for name, m in found.values())
    missed = [tower for tower in towers if not tower.covered]
    if strict and missed:
        raise NotCoveredError(
            "; ".join(f"{t.name or 'the model'} ({t.cls}): {t.verdict}: {t.reason}" for t in missed)
        )
    return towers


def _modules(model: Any, name: str) -> Iterator[tuple[str, Any]]:
    if hasattr(model, "named_modules"):
        yield from model.named_modules(prefix=name)
    elif isinstance(model, (list, tuple, Mapping)):
        for key, item in model.items() if isinstance(model, Mapping) else enumerate(model):
            yield from _modules(item, f"{name}.{key}".lstrip("."))
    else:
        what = f"{name}: " if name else ""
        raise TypeError(f"{what}a {type(model).__name__} is no torch.nn.Module, list or dict")


def _verdict(tower: Any) -> tuple[str, str]:
    from .embedding import needs_shard, tp_group

    embedding = getattr(tower, "embedding", None)
    if embedding is None:
        return "nothing to shard", "this stage does not embed"
    if getattr(embedding, "scatter_to_sequence_parallel", False):
        return "nothing to shard", "it is a plain LM: its embedding shards by itself"
    if not needs_shard(tower, embedding):
        return "nothing to shard", "sequence parallelism is off, or TP is 1"
    size = tp_group(tower, embedding).size()
    rows, length = 4, 4 * size
    parts: list[tuple[str, Callable[..., None]]] = []
    parts += [("its decoder", _run_tower)] if tower.pre_process else []
    parts += [("MTP", _run_mtp)] if getattr(tower, "mtp_process", False) else []
    for name, run in parts:
        try:
            got = _arriving(run, tower, rows, length)
        except Exception as error:
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            return "cannot tell", f"{name} was not reached: {line}"
        if got != rows:
            return "not covered", f"{name} gets {got} of {length} rows, not {rows}, at TP {size}"
    return "covered", f"{' and '.join(name for name, _ in parts)} got this rank's rows"


class _Arrived(BaseException):
    """Holds what arrived at a stand-in; no Exception, which a model's own code may catch."""


def _arrive(*args: Any, **kwargs: Any) -> None:
    states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    raise _Arrived(states.unwrap() if hasattr(states, "unwrap") else states)


class _StandIn:
    """Does something of its own when called; its attributes are those of what it stands in for."""

    scatter_to_sequence_parallel = False

    def __init__(self, real: Any, call: Callable[..., Any]) -> None:
        self.real, self.call = real, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


@contextmanager
def _instead(module: Any, name: str, call: Callable[..., Any]) -> Iterator[_StandIn]:
    """Shadow an attribute of a module by its ``__dict__``, as embedding.py does."""
    stand_in = _StandIn(getattr(module, name), call)
    before = module.__dict__.get(name, stand_in)
    module.__dict__[name] = stand_in
    try:
        yield stand_in
    finally:
        module.__dict__[name] = before
        if before is stand_in:
            del module.__dict__[name]


def _arriving(run: Callable[..., None], tower: Any, rows: int, length: int) -> int:
    """Run a method up to a stand-in, without collectives or gradients, and count what arrives."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "c10d" in func.namespace:
                raise RuntimeError(f"it calls {func}, for which all ranks are needed")
            return func(*args, **(kwargs or {}))

    like, hidden = next(tower.parameters()), tower.config.hidden_size
    positions = torch.arange(length, device=like.device).expand(1, length)
    if getattr(tower, "position_embedding_type", "") == "mrope":
        positions = positions.expand(3, 1, length)
    ids = torch.zeros((1, length), dtype=torch.long, device=like.device)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": None}
    try:
        with ExitStack() as stack:
            for context in (torch.no_grad(), NoCollectives()):  # type: ignore[no-untyped-call]
                stack.enter_context(context)
            full = _instead(tower, "embedding", lambda *_, **__: like.new_zeros(length, 1, hidden))
            stack.enter_context(full)
            run(stack, tower, inputs, like.new_zeros(rows, 1, hidden))
    except _Arrived as arrived:
        got: int = arrived.args[0].shape[0]
        return got
    raise RuntimeError("its forward ended without it")


def _run_tower(stack: ExitStack, tower: Any, inputs: dict[str, Any], _: Any) -> None:
    stack.enter_context(_instead(tower, "decoder", _arrive))
    hooks = tower._forward_pre_hooks.values()
    home = {str(getattr(hook, "__module__", "")).split(".")[0] for hook in hooks}
    # Hooks of these two gather parameters; others may hand in a decoder_input.
    (tower.forward if home <= {"megatron", "torch"} else tower)(**inputs)


def _run_mtp(stack: ExitStack, tower: Any, inputs: dict[str, Any], hidden_states: Any) -> None:
    """Call the MTP block, each of whose layers begins with a norm of what it has embedded."""
    import inspect

    for layer in tower.mtp.layers:
        stack.enter_context(_instead(layer, "enorm", _arrive))
    inputs |= {"hidden_states": hidden_states, "embedding": tower.embedding}
    for name, parameter in inspect.signature(tower.mtp.forward).parameters.items():
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            inputs.setdefault(name, None)
    tower.mtp.forward(**inputs)
