"""README's picture: `python -m steerlens.evals.world.chart evals/records/tiny.json evals/records/tiny.svg`.

Needs matplotlib (`pip install steerlens[eval]`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SETS = {"top3": "3 retrieval heads", "top8": "8 retrieval heads", "all": "all heads"}
ALPHAS = ("0.5", "0.1", "0.01")


def draw(record: dict[str, Any], file: Path) -> None:
    """Left: PASTA on one of two conflicting statements. Right: look-up with heads ablated."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "steerlens"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    cells = record["pasta"]["conflict"]
    baseline = 100 * cells["baseline"]["follows"]
    for name, label in SETS.items():
        values = [100 * cells[f"{name} alpha={alpha}"]["follows"] for alpha in ALPHAS]
        left.plot(range(4), [baseline, *values], marker="o", label=label)
    left.axhline(baseline, color="grey", linewidth=0.8, linestyle=":")
    left.set_xticks(range(4), ["unsteered", *ALPHAS])
    left.set_xlabel("PASTA alpha")
    left.set_ylabel("% of answers")
    left.set_title("follows the emphasised statement", fontsize=10)
    masking = record["masking"]
    ks = [int(k) for k in masking["curve"]]
    right.plot(ks, [100 * v for v in masking["curve"].values()], marker="o", label="top retrieval heads")
    if masking["k"]:
        shares = [100 * s["lookup"] for s in masking["random"]]
        right.scatter([masking["k"]] * len(shares), shares, color="grey", s=12, label="ten random sets of others")
        right.scatter(
            [masking["k"]], [100 * masking["random_mean"]], color="black", marker="_", s=200, label="their mean"
        )
    right.set_xlabel("heads ablated (uniform)")
    right.set_title("look-up at 256 tokens", fontsize=10)
    for axes in (left, right):
        axes.set_ylim(-3, 103)
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"tiny, n = {record['n']} held-out prompts a point", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
