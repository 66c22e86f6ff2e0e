"""Draw the speed that `latency.py` measured: against accuracy, as the paper does, and against the others.

    python benchmarks/plot.py [--results FILE] [--out DIRECTORY]

Writes `speed_accuracy.png` and `ratios.png`. Needs `pip install -e '.[visualize]'`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from peers import OURS

RESULTS = Path(__file__).parent / "results"
TOP1 = {"levit-128S": 76.6, "levit-128": 78.6, "levit-192": 80.0, "levit-256": 81.6, "levit-384": 82.6}


def list_others(variants: dict[str, Any], batch: str) -> list[str]:
    """Return the peers that are not ours in one way or another."""
    return [peer for peer in next(iter(variants.values()))[batch] if not peer.startswith(OURS)]


def draw_speed_and_accuracy(variants: dict[str, Any], batch: str) -> Any:
    """Return a figure of ImageNet accuracy over images a second, a line a peer."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    names = [name for name in variants if name in TOP1]
    for peer in [OURS, *list_others(variants, batch)]:
        rows = [variants[name][batch].get(peer) for name in names]
        points = [(row["images_per_second"], TOP1[name]) for name, row in zip(names, rows, strict=True) if row]
        is_ours = peer == OURS
        axes.plot(*zip(*points, strict=True), "o-", label=peer, lw=3 if is_ours else 1, zorder=3 if is_ours else 2)
    for name in names:
        rate = variants[name][batch][OURS]["images_per_second"]
        axes.annotate(name, (rate, TOP1[name]), (8, -4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel=f"images a second, batches of {batch}", ylabel="top-1 on ImageNet, as published (%)")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter("{x:.0f}")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def draw_ratios(variants: dict[str, Any], batches: list[str]) -> Any:
    """Return a figure of how many times as long as ours the others take."""
    figure, all_axes = plt.subplots(1, len(batches), figsize=(5 * len(batches), 4.5), sharey=True, layout="constrained")
    for axes, batch in zip(np.atleast_1d(all_axes), batches, strict=True):
        peers = list_others(variants, batch)
        height = 0.8 / len(variants)
        for i, (variant, results) in enumerate(variants.items()):
            spreads = [results[batch].get(peer, {}).get("times_ours") for peer in peers]
            found = [(row, spread) for row, spread in enumerate(spreads) if spread]
            medians = np.array([spread["median"] for _, spread in found])
            reach = np.abs(np.array([(spread["least"], spread["most"]) for _, spread in found]).T - medians)
            places = [row + (i - len(variants) / 2 + 0.5) * height for row, _ in found]
            axes.barh(places, medians, height, xerr=reach, label=variant, error_kw={"lw": 0.8})
        axes.axvline(1, color="black", lw=1)
        axes.set(
            yticks=range(len(peers)), yticklabels=peers, title=f"batch {batch}", xlabel="time, as a multiple of ours"
        )
        axes.grid(axis="x", alpha=0.3)
    np.atleast_1d(all_axes)[0].invert_yaxis()
    np.atleast_1d(all_axes)[-1].legend(fontsize=8)
    return figure


def main() -> None:
    """Read, draw, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS / "latency.json")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    matplotlib.use("agg")
    results = json.loads(arguments.results.read_text(encoding="utf-8"))["variants"]
    variants = {name: next(iter(types.values())) for name, types in results.items()}  # of the first type measured
    batches = list(next(iter(variants.values())))
    arguments.out.mkdir(parents=True, exist_ok=True)
    if TOP1.keys() & variants.keys():
        draw_speed_and_accuracy(variants, batches[-1]).savefig(arguments.out / "speed_accuracy.png", dpi=120)
    draw_ratios(variants, batches).savefig(arguments.out / "ratios.png", dpi=120)


if __name__ == "__main__":
    main()
