# SPDX-License-Identifier: Apache-2.0
"""Rule 12: what the runtime patch adds to a forward that it does not act on, in nanoseconds.

The patched method's body is replaced by nothing, so that only the patch itself is timed.

Example:
    python benchmarks/overhead.py
"""

import statistics
import sys
import timeit
from pathlib import Path

from megatron_sp_fix.demo.ranks import Ranks

ROUNDS, CALLS = 21, 20_000


def measure() -> dict[str, float]:
    """Time the patched method against the bare one, interleaved; medians of the differences."""
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
        differences = []
        for _ in range(ROUNDS):
            bare, added = (
                min(timeit.repeat(lambda: method(model, **call), number=CALLS, repeat=1))
                for method in (nothing, patched)
            )
            differences.append((added - bare) / CALLS * 1e9)
        results[name] = statistics.median(differences)
    return results


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import overhead  # by its name, so that the ranks can import it

    with Ranks(2, tp=2) as ranks:
        for rank, result in enumerate(ranks.run(overhead.measure)):
            for name, nanoseconds in result.items():
                print(f"rank {rank}: {name}: {nanoseconds:.0f} ns a forward (limit: 2000)")
