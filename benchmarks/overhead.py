# SPDX-License-Identifier: Apache-2.0
"""Rule 14: what the runtime patch adds to a forward that it does not act on, in nanoseconds.

The patched method's body is replaced by nothing, so that only the patch itself is timed. Of many
rounds the fastest counts, as `timeit` advises: what else the machine does only adds to a time.

Example:
    python benchmarks/overhead.py
"""

import sys
import timeit
from pathlib import Path

from megatron_sp_fix.demo.ranks import Ranks

ROUNDS, CALLS = 101, 2_000


def measure() -> dict[str, float]:
    """Time the patched method and the bare one, interleaved; differences of the fastest rounds."""
    import megatron_sp_fix
    from megatron.core.models.gpt import GPTModel
    from megatron_sp_fix.demo import models

    plain, tower = models.pair("gpt")
    data = models.batch()
    arguments = {
        "input_ids": data["input_ids"],
        "position_ids": data["position_ids"],
        "decoder_input": None,
        "inference_context": None,
        "packed_seq_params": None,
    }
    given = {**arguments, "decoder_input": data["input_ids"]}

    def nothing(self, *args, **kwargs):
        pass

    GPTModel._preprocess = nothing
    megatron_sp_fix.apply()
    patched = GPTModel._preprocess
    results = {}
    for name, model, call in (
        ("plain LM", plain, arguments),
        ("tower given decoder_input", tower, given),
    ):
        methods = (nothing, patched)
        rounds = [
            [timeit.timeit(lambda: method(model, **call), number=CALLS) for method in methods]
            for _ in range(ROUNDS)
        ]
        bare, added = map(min, zip(*rounds))
        results[name] = (added - bare) / CALLS * 1e9
    return results


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import overhead  # by its name, so that the ranks can import it

    with Ranks(2, tp=2) as ranks:
        for rank, result in enumerate(ranks.run(overhead.measure)):
            for name, nanoseconds in result.items():
                print(f"rank {rank}: {name}: {nanoseconds:.0f} ns a forward (limit: 2000)")
