# SPDX-License-Identifier: Apache-2.0
"""Draw what embedding.py and step.py measured: each JSON becomes docs/ITS_NAME.png.

With ``--growth``, input steps at several TP sizes become one picture, docs/growth.png.

Example:
    python benchmarks/plots.py benchmarks/results/{embedding,step}-gpus.json
    python benchmarks/plots.py --growth benchmarks/results/embedding-gpus-{long,tp4}.json
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Where the fix does what a plain LM does, its line lies on the plain LM's, which is wider.
STYLES = {
    "plain LM": {"color": "#9ecae1", "linewidth": 6, "marker": "o", "markersize": 9},
    "tower, this fix": {"color": "#08519c", "marker": "o", "markersize": 4},
    "tower, native fix": {"color": "#d95f02", "marker": "s", "markersize": 5},
    "tower, SP off": {"color": "#7a7a7a", "marker": "^", "markersize": 5},
    "all-reduce alone": {
        "color": "#d95f02",
        "linestyle": ":",
        "label": "all-reduce, all-gather alone",
    },
    "reduce-scatter alone": {
        "color": "black",
        "linestyle": ":",
        "label": "reduce-scatter, all-gather alone",
    },
}


def draw(source: Path, out: Path) -> None:
    """Draw bytes kept, milliseconds and their ratio against the sequence length, worst rank."""
    data = json.loads(source.read_text())
    lengths = sorted({row["length"] for row in data["results"]})
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.7), layout="constrained")
    for axis in axes:
        axis.set(xscale="log", xlabel="sequence length, tokens")
    for axis in axes[:2]:
        axis.set(yscale="log")
    reference = None  # the plain LM, which is first
    for name, style in STYLES.items():
        rows = [row for row in data["results"] if row["variant"] == name]
        kept = [max(rank["kept_bytes"] or 0 for rank in row["ranks"]) / 2**20 for row in rows]
        if not rows:
            continue
        times = [
            max((rank["step_ms"] for rank in row["ranks"]), key=lambda time: time["median"])
            for row in rows
        ]
        reference = reference or times
        axes[1].plot(lengths, [time["median"] for time in times], **{"label": name, **style})
        low, high = ([time[quartile] for time in times] for quartile in ("q1", "q3"))
        axes[1].fill_between(lengths, low, high, color=style["color"], alpha=0.3)
        if all(kept):  # of a model, not of collectives alone
            axes[0].plot(lengths, kept, **style)
            ratios = [time["median"] / plain["median"] for time, plain in zip(times, reference)]
            axes[2].plot(lengths, ratios, **style)
    axes[0].set_ylabel("MiB kept from forward to backward")
    axes[1].set_ylabel("ms forward and backward" + " on CPUs" * (data["mode"] == "cpu"))
    axes[2].set_ylabel("ms, against the plain LM's")
    for axis in axes[:2]:
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    for axis in axes:
        axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(out, dpi=100, pil_kwargs={"optimize": True})
    plt.close(figure)


def grow(sources: list[Path], out: Path) -> None:
    """Draw bytes kept and the forward's milliseconds against TP, at the longest length of all."""
    data = {
        file["machine"]["ranks"]: file for file in map(json.loads, map(Path.read_text, sources))
    }
    length = min(max(row["length"] for row in file["results"]) for file in data.values())
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.7), layout="constrained")
    for name, style in STYLES.items():
        ranks = [
            next(
                r["ranks"]
                for r in data[tp]["results"]
                if (r["variant"], r["length"]) == (name, length)
            )
            for tp in sorted(data)
        ]
        kept = [max(mine["kept_bytes"] or 0 for mine in of) / 2**20 for of in ranks]
        times = [max(mine["forward_ms"]["median"] for mine in of) for of in ranks]
        axes[1].plot(sorted(data), times, **style | {"label": name})
        if all(kept):
            axes[0].plot(sorted(data), kept, **style)
    axes[0].set_ylabel(f"MiB kept, {length:,} tokens")
    axes[1].set_ylabel(f"ms forward, {length:,} tokens")
    for axis in axes:
        axis.set(xlabel="tensor parallel size", ylim=(0, None), xticks=sorted(data))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out, dpi=100, pil_kwargs={"optimize": True})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, nargs="+", help="JSON files")
    docs = Path(__file__).parent.parent / "docs"
    parser.add_argument("--into", type=Path, default=docs, help="folder")
    parser.add_argument("--growth", action="store_true", help="one picture of several TP sizes")
    options = parser.parse_args()
    if options.growth:
        grow(options.sources, options.into / "growth.png")
    else:
        for source in options.sources:
            draw(source, options.into / f"{source.stem}.png")
