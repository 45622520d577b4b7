# SPDX-License-Identifier: Apache-2.0
"""Show the bug and the fix on real ranks: a plain LM, a tower as it is, a tower with the fix."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

__all__ = ["demo"]

_NAMES = {"gpt": "GPTModel", "hybrid": "Hybrid", "mtp": "GPT + MTP"}
_HEADER = ("model", "run", "decoder input", "logits", "bytes kept", "logits", "loss", "grads")


def demo(tp: int) -> int:
    """Run the demonstration and print its table.

    Args:
        tp: tensor parallel size: as many CPU ranks are started, unless this process is a rank of a
            ``torchrun`` job, whose ranks then take part (NCCL where there is a GPU for each).

    Returns:
        int: 0 if every row with the fix holds on every rank, else 1.

    Raises:
        ValueError: `tp` is under 2, or does not divide the job's number of ranks.
    """
    world = int(os.environ.get("WORLD_SIZE", tp))
    if tp < 2 or world % tp:
        raise ValueError(f"--tp {tp} does not fit: it must be at least 2 and divide {world} ranks")
    if "RANK" in os.environ:
        return _in_job(int(os.environ["RANK"]), world, tp)
    from .ranks import Ranks

    # The ranks import megatron-core, which warns of every optional package that is not there.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    _progress(f"starting {tp} ranks")
    with Ranks(tp) as ranks:
        return _report(tp, lambda kind: ranks.run(measure, kind, 8 * tp, tp=tp))


def measure(kind: str, length: int) -> list[dict[str, Any]]:
    """Measure one kind of model on this rank.

    Args:
        kind: one of ``models.KINDS``.
        length: tokens a sequence.

    Returns:
        list[dict]: a row for the plain LM, the tower as it is and the tower with the fix; empty if
        this release cannot build the model here.
    """
    from . import applied, models

    _quiet()
    if not models.has(kind):
        return []
    plain, tower = models.pair(kind)
    data = models.batch(length)
    expected = models.step(plain, data)
    rows = [_row(expected, expected, "")]
    for fixed in (False, True):
        out: dict[str, Any] = {}
        error = ""
        try:
            with applied() if fixed else nullcontext():
                models.step(tower, data, out=out)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        rows.append(_row(expected, out, error))
    return rows


def _row(expected: dict[str, Any], actual: dict[str, Any], error: str) -> dict[str, Any]:
    from .models import differences

    wrong = differences(expected, actual)
    shard, logits = actual.get("shard"), actual.get("logits 0")
    return {
        "shard": list(shard.shape) if shard is not None else None,
        "bytes": shard.untyped_storage().nbytes() if shard is not None else None,
        "logits": list(logits.transpose(0, 1).shape) if logits is not None else None,
        "same": [not any(n.startswith(part) for n in wrong) for part in ("logits", "loss", "grad")],
        "error": error.splitlines()[0] if error else "",
    }


def _report(tp: int, run: Callable[[str], list[list[dict[str, Any]]]], shown: bool = True) -> int:
    """Measure every kind of model and print the rows of rank 0; judge those of every rank."""
    from . import status

    found = status()
    table: list[tuple[str, ...]] = [_HEADER]
    notes, good = [], True
    for kind, name in _NAMES.items():
        _progress(f"{name}: plain LM, tower, tower with the fix", shown)
        ranks = run(kind)
        if not ranks[0]:
            notes.append(f"{name}: this release needs Transformer Engine for it; not run")
            continue
        native = any(
            site.native == "native" and site.name.startswith({"hybrid": "Hybrid"}.get(kind, "GPT"))
            for site in found.sites
        )
        plain, _, fixed = zip(*ranks)
        good &= all(
            all(row["same"])
            and row["shard"] == reference["shard"]
            and row["bytes"] == reference["bytes"]
            for row, reference in zip(fixed, plain)
        )
        labels = (
            "plain LM",
            "tower, native fix" if native else "tower, unpatched",
            "tower, patched",
        )
        for label, row in zip(labels, ranks[0]):
            marks = ("yes" if same else "NO" for same in row["same"])
            table.append(
                (
                    name,
                    label,
                    *(str(row[key] or "-") for key in ("shard", "logits", "bytes")),
                    *marks,
                )
            )
            if row["error"]:
                notes.append(f"{name}, {label}: {row['error']}")
    if shown:
        widths = [max(map(len, column)) for column in zip(*table)]
        print(f"megatron-core {found.version} at {found.path}, TP {tp}, SP on, s = {8 * tp}, b = 2")
        print(
            "decoder input [s/tp, b, h] and the bytes it keeps for backward; logits [b, s, v/tp];"
        )
        print("logits, loss and grads: bitwise those of the plain LM?\n")
        for line in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        print("", *notes, sep="\n  ")
        verdict = "every patched row holds" if good else "A PATCHED ROW DOES NOT HOLD"
        print(f"\n{verdict}, on every rank")
    return 0 if good else 1


def _in_job(rank: int, world: int, tp: int) -> int:
    """Take part in the surrounding job as the rank that this process is."""
    from .ranks import setup, teardown

    _quiet()
    setup(rank, world, "env://", tp=tp)
    import torch

    def run(kind: str) -> list[list[dict[str, Any]]]:
        everyone: list[Any] = [None] * world
        torch.distributed.all_gather_object(everyone, measure(kind, 8 * tp))
        return everyone

    try:
        return _report(tp, run, shown=rank == 0)
    finally:
        teardown()


def _progress(text: str, shown: bool = True) -> None:
    if shown:
        print(f"megatron-sp-fix demo: {text} ...", file=sys.stderr, flush=True)


def _quiet() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
