# SPDX-License-Identifier: Apache-2.0
"""A model's input step: from token ids to what the decoder takes, in bf16, one sequence.

The real forward runs, with a decoder that passes on what it is given: a plain LM, a tower with this
fix, a tower with the release's own fix, a tower with sequence parallelism off. Then collectives
alone: a reduce-scatter, which no variant can beat, or an all-reduce as the forward, and an
all-gather as the backward.

Example:
    python benchmarks/embedding.py
    torchrun --nproc-per-node 2 benchmarks/embedding.py
    NCCL_P2P_DISABLE=1 python benchmarks/embedding.py --rounds 30 --out no-p2p.json
"""

import argparse
from typing import Any

import common
import torch


class Pass(torch.nn.Module):
    """A decoder that does nothing."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return what the decoder is given."""
        return hidden_states


def measure(options: argparse.Namespace) -> list[tuple]:
    """Measure all variants at all lengths: (length, variant, figures)."""
    from megatron_sp_fix.demo import models

    def build(scatter: bool, **fields: Any) -> Any:
        model = models.build(
            "gpt",
            scatter,
            position="none",
            layers=1,
            config=common.config(
                options, num_attention_heads=options.ranks, ffn_hidden_size=64, **fields
            ),
            model={"vocab_size": options.vocabulary, "post_process": False},
        )
        model.decoder = Pass()
        return model

    plain, tower, off = build(True), build(False), build(False, sequence_parallel=False)
    for model in (tower, off):
        model.load_state_dict(plain.state_dict())
    rows = []
    with common.fixed(tower) as native:
        models_of = {
            "plain LM": plain,
            "tower, this fix": tower,
            "tower, native fix": native,
            "tower, SP off": off,
        }
        for length in options.lengths:
            if not options.cpu:
                torch.cuda.empty_cache()
            variants = at(length, models_of, options)
            with torch.no_grad():
                sharding = [v for v in variants.values() if v.model not in (None, off)]
                expected, *others = (variant.forward() for variant in sharding)
            assert all(torch.equal(expected, shard) for shard in others)
            del expected, others
            figures = common.compare(variants, options)
            rows += [(length, name, of) for name, of in figures.items()]
    return rows


def at(length: int, models: dict[str, Any], options: argparse.Namespace) -> dict:
    """The variants at one length."""
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    data = common.tokens(length, options.vocabulary)
    del data["labels"]
    like = {"dtype": torch.bfloat16, "device": torch.cuda.current_device()}
    full = torch.ones(length, 1, options.hidden, **like)
    shard = torch.ones(length // options.ranks, 1, options.hidden, **like)

    def embeds(model: Any) -> common.Variant:
        grad = shard if model.config.sequence_parallel else full
        return common.Variant(lambda: model(**data), lambda out: out.backward(grad), model)

    variants = {name: embeds(model) for name, model in models.items() if model}
    group = get_tensor_model_parallel_group()
    summed, gathered = torch.empty_like(shard), torch.empty_like(full)

    def scatter() -> torch.Tensor:
        torch.distributed.reduce_scatter_tensor(summed, full, group=group)
        return summed

    def reduce() -> torch.Tensor:
        torch.distributed.all_reduce(gathered, group=group)
        return gathered

    def gather(_: torch.Tensor) -> None:
        torch.distributed.all_gather_into_tensor(gathered, shard, group=group)

    variants["reduce-scatter alone"] = common.Variant(scatter, gather)
    variants["all-reduce alone"] = common.Variant(reduce, gather)
    return variants


if __name__ == "__main__":
    import embedding  # by its name, so that the ranks can import it

    common.run(
        "embedding",
        embedding.measure,
        common.parse(
            __doc__.splitlines()[0],
            lengths=[2**power for power in range(12, 18)],
            hidden=4096,
            vocabulary=152064,
        ),
    )
