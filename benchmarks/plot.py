"""Draw the stored results.

    python benchmarks/plot.py [--results FILE] [--runs FILE] [--out DIRECTORY]

Writes `speed_accuracy.png` and `ratios.png` from the results of `latency.py`, and `cifar10.png` from the training
runs of the embedded model. Requires `pip install -e '.[visualize]'`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from levit_flax.visualize import draw_curves
from peers import OURS

RESULTS = Path(__file__).parent / "results"
TOP1 = {"levit-128S": 76.6, "levit-128": 78.6, "levit-192": 80.0, "levit-256": 81.6, "levit-384": 82.6}  # published
DPI = 120


def list_others(variants: dict[str, Any], batch: str) -> list[str]:
    """Return the names of the peers that do not run levit-flax."""
    return [peer for peer in next(iter(variants.values()))[batch] if not peer.startswith(OURS)]


def draw_speed_and_accuracy(variants: dict[str, Any], batch: str) -> Any:
    """Plot ImageNet accuracy over images per second, with one line per peer."""
    figure, axes = plt.subplots(figsize=(7.5, 5.5), layout="constrained")
    names = [name for name in variants if name in TOP1]
    for peer in [*list_others(variants, batch), OURS]:
        rows = [variants[name][batch].get(peer) for name in names]
        points = [(row["images_per_second"], TOP1[name]) for name, row in zip(names, rows, strict=True) if row]
        style = {"color": "black", "lw": 3, "ms": 8} if peer == OURS else {"lw": 1, "ms": 5}
        axes.plot(*zip(*points, strict=True), "o-", label=peer, **style)
    axes.set(
        xscale="log",
        xlabel=f"images per second, batch size {batch}",
        ylabel="published top-1 accuracy on ImageNet (%)",
        yticks=[TOP1[name] for name in names],
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    right = axes.secondary_yaxis("right")
    right.set_yticks([TOP1[name] for name in names], names)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def draw_ratios(variants: dict[str, Any], batches: list[str]) -> Any:
    """Plot the time of each peer relative to levit-flax, with one bar per variant."""
    figure, all_axes = plt.subplots(1, len(batches), figsize=(5 * len(batches), 5), sharey=True, layout="constrained")
    for axes, batch in zip(np.atleast_1d(all_axes), batches, strict=True):
        peers = list_others(variants, batch)
        height = 0.8 / len(variants)
        for i, (variant, results) in enumerate(variants.items()):
            spreads = [results[batch].get(peer, {}).get("times_ours") for peer in peers]
            measured = [(row, spread) for row, spread in enumerate(spreads) if spread]
            medians = np.array([spread["median"] for _, spread in measured])
            reach = np.abs(np.array([(spread["least"], spread["most"]) for _, spread in measured]).T - medians)
            places = [row + (i - len(variants) / 2 + 0.5) * height for row, _ in measured]
            axes.barh(places, medians, height, xerr=reach, label=variant, error_kw={"lw": 0.8})
        axes.axvline(1, color="black", lw=1)
        axes.set(
            yticks=range(len(peers)),
            yticklabels=peers,
            title=f"batch size {batch}",
            xlabel="time relative to levit-flax (over 1 is slower)",
        )
        axes.grid(axis="x", alpha=0.3)
    first = np.atleast_1d(all_axes)[0]
    first.invert_yaxis()
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=len(variants), frameon=False)
    return figure


def draw_training(reports: list[dict[str, Any]]) -> Any:
    """Plot successive training runs of one model as one, with lines between them."""
    joined: list[dict[str, float]] = []
    starts, parts = [], []
    for report in reports:
        start = joined[-1]["epoch"] if joined else 0
        starts.append(start)
        joined += [{**row, "epoch": start + row["epoch"]} for row in report["history"]]
        size = report["recipe"]["image_size"] or report["recipe"]["architecture"]["image_size"]
        parts.append(f"{report['recipe']['epochs']} at {size} pixels")
    figure = draw_curves(joined)
    for axes in figure.axes:
        for start in starts[1:]:
            axes.axvline(start + 0.5, color="0.5", lw=0.8, ls="--")
    figure.suptitle(f"Epochs: {', '.join(parts)}", fontsize=9)
    return figure


def main() -> None:
    """Read the results and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "latency.json", help="file that latency.py wrote")
    parser.add_argument("--runs", type=Path, default=RESULTS / "cifar10.json", help="file that embed_model.py wrote")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the figures")
    arguments = parser.parse_args()
    matplotlib.use("agg")
    results = json.loads(arguments.results.read_text(encoding="utf-8"))["variants"]
    variants = {name: next(iter(dtypes.values())) for name, dtypes in results.items()}  # the first dtype
    batches = list(next(iter(variants.values())))
    arguments.out.mkdir(parents=True, exist_ok=True)
    if TOP1.keys() & variants.keys():
        draw_speed_and_accuracy(variants, batches[-1]).savefig(arguments.out / "speed_accuracy.png", dpi=DPI)
    draw_ratios(variants, batches).savefig(arguments.out / "ratios.png", dpi=DPI)
    runs = json.loads(arguments.runs.read_text(encoding="utf-8"))
    draw_training(runs).savefig(arguments.out / "cifar10.png", dpi=DPI)


if __name__ == "__main__":
    main()
