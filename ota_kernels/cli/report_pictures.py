"""Pictures of a merge's report, as SVG that takes the page's text colour."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from ..errors import RecipeError

_INK = "#010203"  # stands for the page's own text colour
_LINES = ("#3b6fb6", "#c8553d", "#2a9d8f", "#8d6a9f", "#c99a2e", "#5f7f3b", "#7a5c48", "#b0457b")


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise RecipeError("a report needs matplotlib: pip install 'ota-kernels[report]'") from None
    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            **{f"{key}.color": _INK for key in ("text", "xtick", "ytick")},
            "axes.labelcolor": _INK,
            "axes.edgecolor": _INK,
            "axes.facecolor": "none",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 9,
        }
    )
    from matplotlib import pyplot

    return pyplot


def _svg(drawing, label: str) -> str:
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = label  # ids differ between the pictures of a page, not between runs
    file = io.StringIO()
    drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    _pyplot().close(drawing)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def heat_map(rows: Sequence[str], columns: Sequence[str], values: np.ndarray, label: str) -> str:
    """values: percent, NaN where there is nothing: [rows, columns], written into their cells."""
    pyplot = _pyplot()
    width, height = 1.4 + 0.55 * len(columns), 0.7 + 0.27 * len(rows)
    drawing, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    largest = np.nanmax(values) if np.isfinite(values).any() else 1.0
    colours = pyplot.get_cmap("viridis").with_extremes(bad=(0, 0, 0, 0))
    axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=max(largest, 1e-9))
    for i, j in np.argwhere(np.isfinite(values)):
        dark = values[i, j] < 0.6 * largest
        text = f"{values[i, j]:.3g}"
        axes.text(
            j + 0.5, i + 0.5, text, ha="center", va="center", color="#fff" if dark else "#111", fontsize=8
        )
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    for side in axes.spines.values():
        side.set_visible(False)
    return _svg(drawing, label)


def lines(names: Sequence[str], x: Sequence[str], y: Sequence[Sequence[float]], axis: str, label: str) -> str:
    """A line for each name, over layers."""
    pyplot = _pyplot()
    drawing, axes = pyplot.subplots(figsize=(6.4, 3.0), layout="constrained")
    for i, (name, values) in enumerate(zip(names, y, strict=True)):
        style = {"color": _INK, "linewidth": 2.2} if name == "merged" else {"color": _LINES[i % len(_LINES)]}
        axes.plot(range(len(x)), values, marker="o", markersize=3, label=name, **style)
    axes.set_xticks(range(len(x)), x)
    axes.set(xlabel="layer", ylabel=axis, ylim=(0, None))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _svg(drawing, label)
