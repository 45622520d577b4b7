# SPDX-License-Identifier: Apache-2.0
"""What the distributed tests share: the fix, off under --unpatched, and all sorts of embeddings."""

import contextlib
import importlib
import os

import models
import pytest
import torch

import megatron_sp_fix
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron_sp_fix import sites

#: The kinds of models that this release can build here, its version, and its call sites by role.
KINDS = [kind for kind in models.KINDS if models.has(kind)]
RELEASE = sites.version(sites.installed_root())[:2]
SITES = {row.role: row for row in sites.supported(sites.installed_root())[0]}

#: Whether this tree was patched by `diff`. Where that form differs, as the design of both says:
SOURCE = SITES["GPT decoder"].native == "this fix"
flagless = pytest.mark.skipif(SOURCE, reason="source form leaves what has no flag alone")
runtime_form = pytest.mark.skipif(SOURCE, reason="a mechanism of the runtime form")
zeroes_padding = pytest.mark.skipif(
    SOURCE and RELEASE < (0, 16), reason="this release zeroes no padding rows by itself"
)

needs_mtp = pytest.mark.skipif(
    "mtp" not in KINDS, reason="this release needs Transformer Engine for MTP"
)


def fix(*also):
    """The fix, for a `with` block; nothing at all under --unpatched."""
    if os.environ.get("UNPATCHED"):
        return contextlib.nullcontext()
    return megatron_sp_fix.applied(also=also)


def fixed(scatter):
    """The fix for a tower; a plain LM, which scatters, is the reference and runs without it."""
    return contextlib.nullcontext() if scatter else fix()


def place(role="GPT decoder"):
    """The class of a call site in this release, and its method's name."""
    site = SITES[role]
    return getattr(importlib.import_module(site.module), site.cls), site.method


@contextlib.contextmanager
def instead(owner, **attributes):
    """Replace attributes of a class or module by those that are given; put them back."""
    before = {name: owner.__dict__[name] for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def inference():
    """What tells modules that an engine is at work, from 0.18 on."""
    from megatron.core.inference import utils

    mode = getattr(utils, "InferenceMode", None)
    return mode.active() if mode else contextlib.nullcontext()


def tp_rank():
    return parallel_state.get_tensor_model_parallel_rank()


def tp_size():
    return parallel_state.get_tensor_model_parallel_world_size()


def check_same(expected, actual):
    """Bitwise: every logit, the loss and every gradient."""
    assert len([name for name in expected if name.startswith("grad")]) > 5
    different = models.differences(expected, actual)
    assert not different, f"not bitwise equal: {sorted(different)}"


def check_shard(shard, length, view=False):
    """It is this rank's part, and owns the bytes of its own rows and no others.

    What somebody else made a view of, or is told not to clone, stays one in source form.
    """
    assert shard.shape[0] == length // tp_size(), f"{tuple(shard.shape)} for {length} tokens"
    if not (view and SOURCE):
        assert shard.untyped_storage().nbytes() == shard.numel() * shard.element_size()


def check_tower(plain, tower, data, length, **more):
    """One step of a plain LM, one of a tower with the fix: the same numbers, from a shard."""
    expected = models.step(plain, data, **more)
    with fix():
        actual = models.step(tower, data, **more)
    check_same(expected, actual)
    check_shard(actual["shard"], length)


def shadow(model, embedding):
    """Put any callable in the embedding's place, as downstream code does."""
    model.__dict__["embedding"] = embedding


@contextlib.contextmanager
def random_state():
    """Where there is no GPU, let a checkpoint save and restore the CPU's random state alone."""
    if torch.distributed.get_backend() == "nccl":
        yield
        return
    random = tensor_parallel.random
    names = [
        name for name in vars(random) if name in ("_get_cuda_rng_state", "_set_cuda_rng_state")
    ]
    get_state = torch.cuda.get_rng_state
    torch.cuda.get_rng_state = torch.get_rng_state  # as older releases call it
    try:
        with instead(random, **dict.fromkeys(names, lambda *_, **__: None)):
            yield
    finally:
        torch.cuda.get_rng_state = get_state


class NoDecoder(torch.nn.Module):
    def forward(self, hidden_states, **_):
        return hidden_states


def keep_input_step(*towers):
    """Leave of each model what makes the decoder's input, which its forward then returns."""
    for tower in towers:
        tower.decoder, tower.post_process = NoDecoder(), False


def snapshot(model):
    """Class and attributes of every module; of dicts, such as the hooks, what is in them."""
    return {
        (name, key): dict(value) if isinstance(value, dict) else value
        for name, module in model.named_modules()
        for key, value in ({"__class__": type(module)} | module.__dict__).items()
    }


def changes(before, after):
    """Which attributes of two snapshots are not the very same objects."""
    return {name for name in before.keys() | after.keys() if not _same(name, before, after)}


def check_unchanged(before, after):
    """Nothing of the embedding is; the decoder's own attributes change as it runs."""
    assert not {name for name in changes(before, after) if "embedding" in name[0]}


def _same(name, before, after):
    if name not in before or name not in after:
        return False
    old, new = before[name], after[name]
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(value is new[key] for key, value in old.items())
    return old is new or (isinstance(old, (bool, int, float, str)) and old == new)


def full_length(words, ids):
    """Call a word embedding for all rows, whatever its flag says."""
    flag, words.reduce_scatter_embeddings = words.reduce_scatter_embeddings, False
    try:
        return words(ids)
    finally:
        words.reduce_scatter_embeddings = flag


class Scaled(LanguageModelEmbedding):
    """As Gemma's: what the stock embedding returns, scaled."""

    def forward(self, input_ids, position_ids, tokentype_ids=None):
        return super().forward(input_ids, position_ids, tokentype_ids) * 3.0


class Ignoring(LanguageModelEmbedding):
    """Computes by itself and knows no flags: full length, always."""

    def forward(self, input_ids, position_ids, tokentype_ids=None):
        full = full_length(self.word_embeddings, input_ids)
        if self.add_position_embedding:
            full = full + self.position_embeddings(position_ids)
        full = full.transpose(0, 1).contiguous()
        return full.float() if self.config.fp32_residual_connection else full


class SelfSharding(LanguageModelEmbedding):
    """Shards although it was built not to."""

    def forward(self, input_ids, position_ids, tokentype_ids=None):
        full = super().forward(input_ids, position_ids, tokentype_ids)
        return tensor_parallel.scatter_to_sequence_parallel_region(full)


class Proxy:
    """Shards, and forwards every attribute to the real embedding, `__class__` included."""

    def __init__(self, real, sharding=True):
        object.__setattr__(self, "_real", real)
        object.__setattr__(self, "_sharding", sharding)

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "_real"), name)

    @property
    def __class__(self):
        return type(self._real)

    def __call__(self, input_ids, position_ids):
        full = self._real(input_ids=input_ids, position_ids=position_ids)
        if not self._sharding:
            return full
        return tensor_parallel.scatter_to_sequence_parallel_region(full)


class Wrapper(torch.nn.Module):
    """Holds the real embedding as a submodule."""

    def __init__(self, real, sharding):
        super().__init__()
        self.real = real
        self.sharding = sharding

    def forward(self, input_ids, position_ids):
        full = self.real(input_ids=input_ids, position_ids=position_ids)
        if not self.sharding:
            return full
        return tensor_parallel.scatter_to_sequence_parallel_region(full)


def _function(model, sharding):
    real = model.embedding

    def embed(input_ids, position_ids):
        full = real(input_ids=input_ids, position_ids=position_ids)
        if not sharding:
            return full
        return tensor_parallel.scatter_to_sequence_parallel_region(full)

    shadow(model, embed)


def _hook(model, sharding):
    def scatter(module, args, full):
        return tensor_parallel.scatter_to_sequence_parallel_region(full) if sharding else None

    model.embedding.register_forward_hook(scatter)


def _instance_forward(model, sharding):
    real = model.embedding.forward

    def forward(input_ids, position_ids):
        full = real(input_ids, position_ids)
        if not sharding:
            return full
        return tensor_parallel.scatter_to_sequence_parallel_region(full)

    model.embedding.forward = forward


def _subclass(model, sharding):
    model.embedding.__class__ = SelfSharding if sharding else Ignoring


#: Ways to stand in for the stock embedding: called with a model and whether to shard.
STAND_INS = {
    "wrapper": lambda model, sharding: shadow(model, Wrapper(model.embedding, sharding)),
    "proxy": lambda model, sharding: shadow(model, Proxy(model.embedding, sharding)),
    "function": _function,
    "hook": _hook,
    "instance forward": _instance_forward,
    "subclass": _subclass,
}
