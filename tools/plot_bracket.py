"""Draws README's picture of the exact threshold from one pass: tools/exact_threshold.svg.

    ota-merge demo DIR && python tools/plot_bracket.py DIR/seed0/ota_ffg_density.yaml

The curves are one expert's real saliencies: how many elements reach a saliency (all of them, which the merge
never sorts), and the same estimated from the sample that the bracket is made of.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from ota_kernels.backends import native
from ota_kernels.planning.inputs import Inputs
from ota_kernels.recipe.schema import load_recipe
from ota_kernels.run.decide import scores_of
from ota_kernels.select import thresholds as decide
from ota_kernels.select.bracket import bracket_of, cluster_count
from ota_kernels.select.sample import sample
from ota_kernels.tensors.found import selection_of
from ota_kernels.tensors.terms import saliency_of_score, score_bits, score_of_bits

_OUT = Path(__file__).parent / "exact_threshold.svg"
_DROPPED, _KEPT, _OPEN, _LINE = "#9aa5b1", "#2f6f4f", "#d9822b", "#1f2933"


def main(recipe_path: str) -> None:
    recipe = load_recipe(recipe_path)
    inputs = Inputs(recipe)
    tensors = [entry.inputs() for entry in inputs.entries]
    scores = [native.scores(t, 0, scores_of(len(t.experts), t))[0] for t in tensors]
    every = np.sort(np.concatenate(scores))[::-1]
    count = cluster_count(every.size)
    (sampled,) = sample(tensors, count, [0], lambda t: scores_of(len(t.experts), t), native, map)
    selection = selection_of(recipe.models[0].parameters)
    bracket = bracket_of(selection, sampled)
    lowest = bracket.lowest
    highest = score_of_bits(score_bits(lowest) + bracket.span - 1)
    k = decide.count_of_density(selection.value, every.size)
    exact = every[k - 1]
    inside = int(((every >= lowest) & (every <= highest)).sum())
    inputs.close()

    plt.rcParams |= {"font.size": 9, "svg.hashsalt": "ota", "svg.fonttype": "none"}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(3, 2), constrained_layout=True)
    share = np.arange(1, every.size + 1) / every.size
    estimate = np.sort(sampled, axis=None)[::-1]
    estimated = np.arange(1, estimate.size + 1) / estimate.size
    lo, hi, theta = (saliency_of_score(float(x)) for x in (lowest, highest, exact))
    for axis in axes:
        axis.axvspan(lo, hi, color=_OPEN, alpha=0.25, lw=0)
        axis.plot(every * 2.0**-64, share, color=_LINE, lw=1.6, label="all elements")
        axis.plot(estimate * 2.0**-64, estimated, color=_OPEN, lw=1.2, ls="--", label="sample")
        axis.axhline(selection.value, color=_KEPT, lw=0.8)
        axis.axvline(theta, color=_KEPT, lw=0.8)
        axis.set_xscale("log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("saliency s = h d²")
    left, right = axes
    left.set_xlim(theta * 1e-4, theta * 1e3)
    left.set_ylim(0, 1)
    left.set_ylabel("share of elements of at least s")
    left.legend(frameon=False, loc="lower left")
    left.text(lo / 1.6, 0.93, "dropped, final", color=_DROPPED, ha="right", weight="bold")
    left.text(hi * 1.6, 0.93, "kept, final", color=_KEPT, weight="bold")
    left.set_title(f"one expert, {every.size:,} edits, density {selection.value}", loc="left")
    width = hi / lo
    right.set_xlim(lo / width**0.4, hi * width**0.4)
    reach = (np.searchsorted(-every, -np.float32([lowest, highest])) / every.size).tolist()
    margin = 0.4 * (reach[0] - reach[1])
    right.set_ylim(reach[1] - margin, reach[0] + margin)
    right.set_title(f"undecided: {inside:,} ({inside / every.size:.1%})", loc="left", color=_OPEN)
    right.annotate(
        f"k = {k:,}\nexact threshold",
        (theta, selection.value),
        (0.97, 0.95),
        textcoords="axes fraction",
        ha="right",
        va="top",
        color=_KEPT,
        arrowprops={"arrowstyle": "-", "color": _KEPT, "lw": 0.6},
    )
    right.minorticks_off()
    right.set_xticks([lo, theta, hi], [f"{x:.2g}" for x in (lo, theta, hi)])
    figure.savefig(_OUT, metadata={"Date": None})
    print(f"{_OUT}: sample of {estimate.size:,}, bracket {lo:.3g} to {hi:.3g}, threshold {theta:.6g}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/plot_bracket.py RECIPE")
    main(sys.argv[1])
