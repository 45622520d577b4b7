# SPDX-License-Identifier: Apache-2.0
"""Draw what embedding.py and step.py measured: each JSON becomes docs/ITS_NAME.png.

Example:
    python benchmarks/plots.py benchmarks/results/*.json
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
    "reduce-scatter alone": {"color": "black", "linestyle": ":"},
}


def draw(source: Path, out: Path) -> None:
    """Draw bytes kept and milliseconds against the sequence length, of the worst rank.

    Milliseconds only where each rank had a GPU: else they are not those of a training job.
    """
    data = json.loads(source.read_text())
    timed = data["mode"] == "gpus"
    lengths = sorted({row["length"] for row in data["results"]})
    size = (9, 3.4) if timed else (4.8, 3.4)
    figure, axes = plt.subplots(1, 1 + timed, figsize=size, layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.set(xscale="log", yscale="log", xlabel="sequence length, tokens")
    for name, style in STYLES.items():
        rows = [row for row in data["results"] if row["variant"] == name]
        kept = [max(rank["kept_bytes"] or 0 for rank in row["ranks"]) / 2**20 for row in rows]
        if rows and all(kept):
            axes[0, 0].plot(lengths, kept, label=name, **style)
        if rows and timed:
            times = [
                max((rank["step_ms"] for rank in row["ranks"]), key=lambda time: time["median"])
                for row in rows
            ]
            axes[0, 1].plot(lengths, [time["median"] for time in times], label=name, **style)
            low, high = ([time[quartile] for time in times] for quartile in ("q1", "q3"))
            axes[0, 1].fill_between(lengths, low, high, color=style["color"], alpha=0.3)
            axes[0, 1].set_ylabel("ms forward and backward")
    axes[0, 0].set_ylabel("MiB kept from forward to backward")
    for axis in axes[0]:
        axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, -1].legend(frameon=False, fontsize="small")
    figure.savefig(out, dpi=100, pil_kwargs={"optimize": True})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, nargs="+", help="JSON files")
    docs = Path(__file__).parent.parent / "docs"
    parser.add_argument("--into", type=Path, default=docs, help="folder")
    options = parser.parse_args()
    for source in options.sources:
        draw(source, options.into / f"{source.stem}.png")
