# SPDX-License-Identifier: Apache-2.0
"""Show the bug and the fix on real ranks: a plain LM, a tower as it is, a tower with the fix."""

import json
import logging
import os
import sys
import warnings
from contextlib import nullcontext
from typing import Any, Optional

from .ranks import RankError, Ranks

__all__ = ["demo", "measure"]

#: By kind of model: its name in the table, and what the names of its call sites begin with.
_KINDS = {
    "gpt": ("GPTModel", ("GPTModel",)),
    "hybrid": ("Hybrid", ("HybridModel", "MambaModel")),
    "mtp": ("GPT + MTP", ("MultiTokenPrediction",)),
}
_BY_ITSELF = {"no shard": "unpatched", "own scatter": "own scatter", "this fix": "patched source"}
_HEADER = ("model", "run", "decoder input", "bytes kept", "logits", "logits", "loss", "grads")


def demo(tp: int, as_json: bool = False) -> int:
    """Run the demonstration and print its table.

    Args:
        tp: tensor parallel size; as many ranks are started, on GPUs if there is one for each.
        as_json: print JSON: ``fixed``, the verdict, and ``rows``, what :func:`measure` returns.

    Returns:
        int: 0 if every row with the fix holds on every rank, else 1; 130 after Ctrl-C.

    Raises:
        ValueError: `tp` is under 2, or more ranks than this machine can carry.
    """
    most = max(8, os.cpu_count() or 1)
    if not 2 <= tp <= most:
        raise ValueError(f"--tp {tp} does not fit: choose from 2 to {most} on this machine")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("the demo starts its own ranks: run it without torchrun, as --tp N")
    try:
        return _report(tp, as_json)
    except RankError as error:
        brief = str(error).splitlines()[0]
        print(f"megatron-sp-fix demo: {brief}; out of memory? try --tp 2", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def measure(kind: str, length: int) -> list[dict[str, Any]]:
    """Measure one kind of model on this rank.

    Args:
        kind: one of ``models.KINDS``.
        length: tokens a sequence.

    Returns:
        list[dict]: a row for the plain LM, for the tower as it is in this process, and for the
        tower with the fix; a single row if this release cannot build the model here.
    """
    from .. import applied, status
    from . import models

    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        plain, tower = models.pair(kind)
    except Exception as failure:  # some need Transformer Engine
        return [_row(kind, "not run", {}, {}, failure)]
    site = next(site for site in status().sites if site.name.startswith(_KINDS[kind][1]))
    by_itself = "patched here" if site.state == "patched" else _BY_ITSELF[site.native]
    data = models.batch(length)
    expected = models.step(plain, data)
    rows = [_row(kind, "plain LM", expected, expected)]
    for run, fix in ((f"tower, {by_itself}", nullcontext()), ("tower, fixed", applied())):
        out: dict[str, Any] = {}
        failure = None
        try:
            with fix:
                models.step(tower, data, out=out)
        except Exception as error:
            failure = error
        rows.append(_row(kind, run, expected, out, failure))
    return rows


def _row(
    kind: str,
    run: str,
    expected: dict[str, Any],
    actual: dict[str, Any],
    failure: Optional[Exception] = None,
) -> dict[str, Any]:
    """One line of the table; `same` tells whether the results are bitwise those expected."""
    from .models import differences

    wrong = differences(expected, actual)
    shard, logits = actual.get("shard"), actual.get("logits 0")
    return {
        "model": _KINDS[kind][0],
        "run": run,
        "decoder input": None if shard is None else list(shard.shape),
        "bytes kept": None if shard is None else shard.untyped_storage().nbytes(),
        "logits": None if logits is None else list(logits.transpose(0, 1).shape),
        "same": {
            part: bool(actual) and not any(name.startswith(part) for name in wrong)
            for part in ("logits", "loss", "grad")
        },
        "error": f"{type(failure).__name__}: {failure}".splitlines()[0] if failure else "",
    }


def _report(tp: int, as_json: bool) -> int:
    """Measure every kind of model, print the rows of rank 0, and judge those of every rank."""
    from .. import status

    rows: list[dict[str, Any]] = []
    fixed = True
    _progress(f"starting {tp} ranks")
    with Ranks(tp) as ranks:
        for kind, (name, _) in _KINDS.items():
            _progress(f"{name}: plain LM, tower, tower with the fix")
            everyone = ranks.run(measure, kind, 8 * tp, tp=tp)
            rows += everyone[0]
            for plain, *_, last in (on_rank for on_rank in everyone if on_rank[1:]):
                kept = all(last[key] == plain[key] for key in ("decoder input", "bytes kept"))
                fixed &= kept and all(last["same"].values())
    found = status()
    if as_json:
        head = {"megatron-core": found.version, "root": str(found.root), "tp": tp, "fixed": fixed}
        print(json.dumps({**head, "rows": rows}, indent=2))
        return 0 if fixed else 1
    table = [_HEADER]
    for row in rows:
        cells = [str(row[key] or "-") for key in _HEADER[:5]]
        table.append((*cells, *("yes" if same else "NO" for same in row["same"].values())))
    widths = [max(map(len, column)) for column in zip(*table)]
    print(f"megatron-core {found.version} at {found.root}, TP {tp}, SP on, s = {8 * tp}, b = 2")
    print("decoder input [s/tp, b, h] and the bytes it keeps for backward; logits [b, s, v/tp];")
    print("logits, loss and grads: bitwise those of the plain LM?\n")
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    for row in rows:
        if row["error"]:
            print(f"\n  {row['model']}, {row['run']}: {row['error']}", end="")
    print(f"\n\n{'every fixed row holds' if fixed else 'A FIXED ROW DOES NOT HOLD'}, on every rank")
    return 0 if fixed else 1


def _progress(text: str) -> None:
    print(f"megatron-sp-fix demo: {text} ...", file=sys.stderr, flush=True)
