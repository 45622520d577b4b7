# SPDX-License-Identifier: Apache-2.0
"""Show the bug and the fix on real ranks: a plain LM, a tower as it is, a tower with the fix."""

import json
import logging
import os
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

from ..patching import applied, status
from .ranks import RankError, Ranks

#: By kind of model: its name in the table, and how the names of its call sites begin.
KINDS = {
    "gpt": ("GPTModel", ("GPTModel",)),
    "hybrid": ("Hybrid", ("HybridModel", "MambaModel")),
    "mtp": ("GPT + MTP", ("MultiTokenPrediction",)),
}
#: What a tower is called that does by itself what `status` says.
AS_IS = {"no shard": "unpatched", "own scatter": "own scatter", "this fix": "patched source"}
COLUMNS = ("model", "run", "decoder input", "bytes kept", "logits")
note = partial(print, "megatron-sp-fix demo:", file=sys.stderr, flush=True)


def demo(tp: int, as_json: bool = False) -> int:
    """Run the demonstration and print its table, or JSON with the verdict as ``fixed``.

    Args:
        tp: tensor parallel size; as many ranks are started, on GPUs if there is one for each.
        as_json: print JSON.

    Returns:
        int: 0 if every row with the fix holds on every rank, else 1.

    Raises:
        ValueError: `tp` is under 2 or too much for this machine, or this is a torchrun job.
        UnsupportedMegatronError: megatron-core is missing, too old or not recognized.
    """
    most = max(8, os.cpu_count() or 1)
    if not 2 <= tp <= most:
        raise ValueError(f"--tp {tp} does not fit: choose from 2 to {most} on this machine")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("the demo starts its own ranks: run it by itself, not under torchrun")
    found = status()
    head = {"megatron-core": found.version, "root": found.root, "tp": tp, "length": 8 * tp}
    rows, fixed = [], True
    try:
        note(f"starting {tp} ranks ...")
        with Ranks(tp, tp=tp) as ranks:
            for kind, (name, _) in KINDS.items():
                note(f"{name}: plain LM, tower, tower with the fix ...")
                everyone = ranks.run(measure, kind, 8 * tp)
                rows += everyone[0]
                for plain, *_, last in (on_rank for on_rank in everyone if on_rank[1:]):
                    fixed &= all(plain[column] == last[column] for column in COLUMNS[2:])
                    fixed &= all(last["same"].values())
    except RankError as error:
        note(str(error).splitlines()[0])
        return 1
    verdict = "every fixed row holds" if fixed else "A FIXED ROW DOES NOT HOLD"
    text = f"{_table(head, rows)}\n{verdict}, on every rank"
    print(json.dumps({**head, "fixed": fixed, "rows": rows}, indent=2) if as_json else text)
    return 0 if fixed else 1


def measure(kind: str, length: int) -> list[dict[str, Any]]:
    """Measure a kind of model on this rank, with so many tokens a sequence.

    Returns:
        list[dict]: a row for the plain LM, for the tower as it is in this process, and for the
        tower with the fix; a single one if this release cannot build the model here.
    """
    from . import models

    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    expected: dict[str, Any] = {}

    def row(run: str, out: dict[str, Any], error: str = "") -> dict[str, Any]:
        wrong = models.differences(expected, out)
        values: list[Any] = [KINDS[kind][0], run, None, None, None]
        if "shard" in out:
            values[2:4] = list(out["shard"].shape), out["shard"].untyped_storage().nbytes()
        if "logits 0" in out:
            values[4] = list(out["logits 0"].transpose(0, 1).shape)
        parts = ("logits", "loss", "grad")
        same = {
            part: bool(out) and not any(name.startswith(part) for name in wrong) for part in parts
        }
        return {**dict(zip(COLUMNS, values)), "same": same, "error": error}

    try:
        plain, tower = models.pair(kind)
    except Exception as failure:  # some need Transformer Engine
        return [row("not run", {}, repr(failure))]
    site = next(site for site in status().sites if site.name.startswith(KINDS[kind][1]))
    as_is = "patched here" if site.state == "patched" else AS_IS[site.native]
    data = models.batch(length)
    expected = models.step(plain, data)
    rows = [row("plain LM", expected)]
    for run, fix in ((f"tower, {as_is}", nullcontext()), ("tower, fixed", applied())):
        out: dict[str, Any] = {}
        error = ""
        try:
            with fix:
                models.step(tower, data, out=out)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
        rows.append(row(run, out, error))
    return rows


def _table(head: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [[*COLUMNS, "logits", "loss", "grads"]]
    for row in rows:
        marks = ("yes" if same else "NO" for same in row["same"].values())
        lines.append([*(str(row[column] or "-") for column in COLUMNS), *marks])
    widths = [max(map(len, column)) for column in zip(*lines)]
    setting = "megatron-core {megatron-core} at {root}, TP {tp}, SP on, s = {length}, b = 2"
    text = [
        setting.format(**head),
        "decoder input [s/tp, b, h] and the bytes it keeps for backward; logits [b, s, v/tp];",
        "logits, loss and grads: bitwise those of the plain LM?\n",
        *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines),
        *(f"  {row['model']}, {row['run']}: {row['error']}" for row in rows if row["error"]),
    ]
    return "\n".join(text) + "\n"
