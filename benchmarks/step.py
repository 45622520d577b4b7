# SPDX-License-Identifier: Apache-2.0
"""A training step (forward, loss, backward) of a tower of four layers, in bf16, one sequence.

A plain LM, a tower with this fix, a tower with the release's own fix, and a tower with sequence
parallelism off, which is how people get by without a fix. Of megatron-core's local layers with
torch's attention, or of its Transformer Engine layers, in bf16 or with FP8's tensorwise scaling.

Example:
    python benchmarks/step.py
    torchrun --nproc-per-node 2 benchmarks/step.py
    python benchmarks/step.py --engine te-fp8 --out te-fp8.json
"""

import argparse
from typing import Any

import common
import torch

PLAIN = "plain LM"


def engine_model(
    scatter: bool, fields: dict[str, Any], sizes: dict[str, Any], options: argparse.Namespace
) -> Any:
    """Build the model of the local layers' sizes from Transformer Engine's."""
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer.transformer_config import TransformerConfig

    fp8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"} if options.engine == "te-fp8" else {}
    config = {
        "num_layers": options.layers,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": options.ranks,
        "sequence_parallel": True,
        **fp8,
        **fields,
    }
    return GPTModel(
        TransformerConfig(**config),
        gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(),
        position_embedding_type="rope",
        scatter_embedding_sequence_parallel=scatter,
        **sizes,
    ).cuda()


def measure(options: argparse.Namespace) -> list[tuple]:
    """Measure all variants at all lengths: (length, variant, figures)."""
    from megatron_sp_fix.demo import models

    def build(scatter: bool, **config: Any) -> Any:
        fields = common.config(
            options,
            ffn_hidden_size=options.ffn,
            num_attention_heads=options.heads,
            num_query_groups=options.groups,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            **config,
        )
        sizes = {"vocab_size": options.vocabulary, "max_sequence_length": max(options.lengths)}
        if options.engine == "local":
            return models.build("gpt", scatter, layers=options.layers, config=fields, model=sizes)
        return engine_model(scatter, fields, sizes, options)

    plain, tower, off = build(True), build(False), build(False, sequence_parallel=False)
    for model in (tower, off):
        model.load_state_dict(plain.state_dict())

    def steps(model: Any, data: dict[str, Any]) -> common.Variant:
        return common.Variant(
            lambda: model(**data).float().mean(), lambda loss: loss.backward(), model
        )

    rows = []
    with common.fixed(tower) as native:
        models_of = {
            PLAIN: plain,
            "tower, this fix": tower,
            "tower, native fix": native,
            "tower, SP off": off,
        }
        for length in options.lengths:
            if not options.cpu:
                torch.cuda.empty_cache()
            data = common.tokens(length, options.vocabulary)
            variants = {name: steps(model, data) for name, model in models_of.items() if model}
            figures = common.compare(variants, options)
            for of in figures.values():
                # A float32 in a Python float: equal if and only if all bits are.
                of["loss_is_plain"] = of["loss"] == figures[PLAIN]["loss"]
            assert figures["tower, this fix"]["loss_is_plain"]
            rows += [(length, name, of) for name, of in figures.items()]
    return rows


if __name__ == "__main__":
    import step  # by its name, so that the ranks can import it

    common.run(
        "step",
        step.measure,
        common.parse(
            __doc__.splitlines()[0],
            lengths=[8192, 32768],
            hidden=4096,
            ffn=12288,
            heads=32,
            groups=8,
            layers=4,
            engine=("local", "te", "te-fp8"),
            vocabulary=32768,
        ),
    )
