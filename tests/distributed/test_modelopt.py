# SPDX-License-Identifier: Apache-2.0
"""ModelOpt on towers of Transformer Engine layers: distillation, EAGLE-3, quantization."""

import importlib.util
from pathlib import Path

import common
import engine
import models
import pytest
import torch
from common import RELEASE, check_same, check_shard, check_tower, fix
from engine import LENGTH
from test_also import eagle_mode, needs

from megatron.core import tensor_parallel
from megatron_sp_fix.demo import models as demo

pytestmark = [engine.needs_engine, needs("modelopt")]
#: How a tower's distillation fails without the fix.
MISMATCH = (
    r"The size of tensor a \(32\) must match the size of tensor b \(16\) "
    "at non-singleton dimension 0"
)
EXAMPLE = Path(__file__).parents[2] / "examples/distill_language_tower.py"


def distil(scatter):
    """What each rank of the example does, with models of Transformer Engine layers."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def build(kind, scatter, layers, config=None):
        return engine.build(scatter, kind, num_layers=layers, **(config or {}))

    def forward(model, data):
        return model(attention_mask=None, **data)  # the layers mask by themselves

    with common.instead(demo, build=build, forward=forward):
        return example.distil(scatter, fix=False)


@pytest.mark.on_ranks(tp=2, timeout=240)
def test_distillation():
    expected = distil(True)
    if RELEASE < (0, 19) and not common.SOURCE:
        with pytest.raises(RuntimeError, match=MISMATCH):
            distil(False)
    with fix():
        actual = distil(False)
    assert actual == expected
    assert actual[-1] < actual[0]


def eagle_pair():
    """A plain LM and a tower with an EAGLE-3 draft, of the plugin's own layers."""
    import modelopt.torch.speculative as speculative

    pair = engine.pair(num_layers=4)
    for model in pair:
        models.seeded(2)
        speculative.convert(model, [("eagle", eagle_mode(model))])
        torch.nn.init.normal_(model.eagle_module.fc.weight, std=0.02)  # which nobody initializes
    return pair


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.on_ranks(tp=2, timeout=240)
def test_eagle3(outer):
    """Standalone; and under the outer model, where only the draft embeds."""
    plain, tower = eagle_pair()
    data = engine.batch()
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1).cuda()
    drafts, given = [], {}
    for model in (plain, tower):
        model.eagle_module.enorm.register_forward_pre_hook(lambda _, args: drafts.append(args[0]))
    if outer:
        full = tower.embedding(data["input_ids"], data["position_ids"])
        given["decoder_input"] = tensor_parallel.scatter_to_sequence_parallel_region(full).clone()
    expected = models.step(plain, data, attention_mask=mask)
    with fix():
        actual = models.step(tower, data, attention_mask=mask, **given)
    check_same(expected, actual)
    assert len(drafts) == 2 and torch.equal(*drafts)
    check_shard(drafts[1], LENGTH)
    check_shard(actual["shard"], LENGTH)


@pytest.mark.on_ranks(tp=2, timeout=240)
def test_eagle3_generates():
    plain, tower = eagle_pair()
    plain.eval(), tower.eval()
    with torch.no_grad():
        for length in (8, 7):  # one that it pads, too
            ids = engine.batch()["input_ids"][:1, :length]
            expected = plain.pseudo_speculative_generate(ids, steps=3)
            with fix():
                actual = tower.pseudo_speculative_generate(ids, steps=3)
            assert expected[1].shape == (1, 3)
            assert all(map(torch.equal, expected, actual))


@pytest.mark.parametrize("config", ["INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG"])
@pytest.mark.on_ranks(tp=2, timeout=600)  # its kernels are compiled at their first use
def test_quantization(config):
    """Calibrated standalone: every scale; then a step of quantization-aware training."""
    import modelopt.torch.quantization as quantization

    plain, tower = engine.pair()

    def calibrate(model):
        with torch.no_grad():
            for seed in range(2):
                model(attention_mask=None, **{**engine.batch(seed), "labels": None})

    def scales(model):
        quantization.quantize(model, getattr(quantization, config), calibrate)
        state = model.state_dict()
        return {name: state[name] for name in state if name.endswith("_amax")}

    expected = scales(plain)
    with fix():
        actual = scales(tower)
    assert len(expected) == 16 and expected.keys() == actual.keys()  # of four linears in two layers
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    check_tower(plain, tower, engine.batch(), LENGTH, attention_mask=None)
