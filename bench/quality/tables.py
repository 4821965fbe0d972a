"""What the bench prints: Markdown tables, and a figure of the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .merges import DENSITIES, PACKS, TIMES, Lab, Method, Scored
from .scores import Scale

LINEAR = "task_arithmetic"


class Results:
    """Of one set: methods' merges by times of the automatic lambda (1 among them), None for their default."""

    def __init__(self, lab: Lab, scale: Scale, base: Scored, experts: Mapping[str, Scored]) -> None:
        self.lab, self.scale, self.base, self.experts = lab, scale, base, experts
        self.merges: dict[str, dict[float | None, Scored]] = {}
        self.grafts: dict[tuple[str, float], dict[str, Scored]] = {}
        self.packs: dict[str, dict[str, Scored]] = {}
        self.merged_packs: dict[str, Scored] = {}

    def best(self, label: str) -> float | None:
        """The setting of a method with the highest mean."""
        found = self.merges[label]
        return max(found, key=lambda times: self.scale.mean(found[times]))


def settings_of(method: Method) -> list[tuple[float | None, dict]]:
    """What a method is merged with, beside its own parameters."""
    automatic = [(1.0, {"lambda": "auto"}), *((x, {"lambda": "auto", "times": x}) for x in TIMES)]
    return [(None, {}), *(automatic if method.scaled else [])]


def overview(results: Mapping[str, Results], methods: Sequence[Method]) -> str:
    """A row per method: mean (worst) of each set at its default, at the automatic lambda, and tuned on the
    other set."""
    kinds = ("default", "auto", "tuned")
    head = ["model", *(f"{kind}, {name}" for kind in kinds for name in results)]
    lines = [
        "Percent of the experts' own accuracy: mean (worst task).",
        "",
        _row(head),
        _row(["-"] * len(head)),
    ]
    for method in methods:
        cells = []
        for kind in kinds:
            for name, found in results.items():
                of_method = found.merges.get(method.label, {})
                others = [other for key, other in results.items() if key != name]
                times = {"default": None, "auto": 1.0}.get(kind, _tuned(others, method.label))
                scored = None if kind == "tuned" and times == "unknown" else of_method.get(times)
                scale = found.scale
                cells.append(
                    "" if scored is None else f"{scale.mean(scored):.1f} ({scale.worst(scored):.0f})"
                )
        if any(cells):
            lines.append(_row([method.label, *cells]))
    return "\n".join(lines)


def _tuned(others: Sequence[Results], label: str) -> float | str | None:
    """What another set has found best of all that is tried; "unknown" where it has not tried them all."""
    whole = [other for other in others if {None, 1.0, *TIMES} <= other.merges.get(label, {}).keys()]
    return whole[0].best(label) if whole else "unknown"


def merges(name: str, results: Results, others: Sequence[Results], methods: Sequence[Method]) -> str:
    """A row per method and setting: default, automatic lambda, the best on the other set, if it is given."""
    tasks = results.scale.tasks
    reference = results.merges.get(LINEAR, {}).get(results.best(LINEAR)) if LINEAR in results.merges else None
    head = ["model", "lambda", *tasks, "mean", "worst", "edits kept", "- best linear"]
    lines = [
        f"Set {name}: accuracy, percent; mean and worst: percent of the expert's own; length in brackets.",
        "",
    ]
    lines += [_row(head), _row(["-"] * len(head))]
    lines.append(_line("base", "", results.base, results, None))
    best = max(results.experts, key=lambda t: results.scale.mean(results.experts[t]))
    lines.append(_line(f"best single expert ({best})", "", results.experts[best], results, None))
    own = [f"{100 * results.experts[t].accuracy(t):.1f}" for t in tasks]
    lines.append(_row(["each task by its own expert", "", *own, "100", "100", "100", ""]))
    for method in methods:
        found = results.merges.get(method.label, {})
        if None not in found:
            continue
        shown: list[tuple[str, Scored]] = [("default", found[None])]
        if 1.0 in found:
            shown.append(("auto", found[1.0]))
            best = _tuned(others, method.label)
            if best in found:
                what = "default" if best is None else "auto" if best == 1 else f"auto x {best:g}"
                shown.append((f"best on the other set: {what}", found[best]))
        lines += [_line(method.label, label, scored, results, reference) for label, scored in shown]
    return "\n".join(lines)


def _line(label: str, setting: str, scored: Scored, results: Results, reference: Scored | None) -> str:
    scale = results.scale
    factor = "" if scored.factor is None else f", {scored.factor:.2f} ({scored.length:.2f})"
    kept = "" if scored.kept is None else f"{100 * scored.kept:.0f}"
    gap = "" if reference is None else _interval(scale.difference(scored, reference))
    accuracies = [f"{100 * scored.accuracy(t):.1f}" for t in scale.tasks]
    return _row(
        [label, f"{setting}{factor}".removeprefix(", "), *accuracies, f"{scale.mean(scored):.1f}",
         f"{scale.worst(scored):.0f}", kept, gap]
    )  # fmt: skip


def _interval(found: tuple[float, float, float]) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*found)


def grafts(name: str, results: Results) -> str:
    """Share of an expert's gain that its grafts have, by density."""
    tasks = results.scale.tasks
    lines = [f"Set {name}: grafts of one expert, percent of its gain over the base: mean (worst).", ""]
    lines += [_row(["density", "ffg", "magnitude", "difference"]), _row(["-"] * 4)]
    for density in DENSITIES:
        pair = [results.grafts.get((by, density)) for by in ("ffg", "magnitude")]
        if None in pair:
            continue
        gains = [[results.scale.gain(t, of_task[t]) for t in tasks] for of_task in pair]
        cells = [f"{sum(g) / len(g):.0f} ({min(g):.0f})" for g in gains]
        lines.append(_row([f"{density:g}", *cells, _interval(results.scale.gain_difference(*pair))]))
    return "\n".join(lines)


def packs(name: str, results: Results) -> str:
    """Share of an expert's gain that its pack has, against its size; and merges of packs, which the experts'
    own is compared with."""
    scale, merged = results.scale, results.merged_packs
    lines = [
        f"Set {name}: experts packed and unpacked, percent of the gain over the base: mean (worst); merges "
        "of them by task arithmetic, `lambda: auto`: of the experts' accuracy.",
        "",
    ]
    lines += [_row(["form", "bits per parameter", "gain", "merge", "- experts'"]), _row(["-"] * 5)]
    for label in ("experts", *PACKS):
        found, together = results.packs.get(label), merged.get(label)
        if found is None and together is None:
            continue
        one = (together,) if found is None else found.values()
        sizes, cells = [s.bits for s in one if s.bits is not None], [label]
        cells.append(f"{sum(sizes) / len(sizes):.2f}" if sizes else "")
        gains = [scale.gain(t, found[t]) for t in scale.tasks] if found else []
        cells.append(f"{sum(gains) / len(gains):.0f} ({min(gains):.0f})" if gains else "")
        cells.append(f"{scale.mean(together):.1f} ({scale.worst(together):.0f})" if together else "")
        difference = ""
        if together and label != "experts" and "experts" in merged:
            mean, low, high = scale.difference(together, merged["experts"])
            difference = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
        lines.append(_row([*cells, difference]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def figure(path: Path, results: Mapping[str, Results], methods: Sequence[Method]) -> None:
    """Accuracy against length per method, gain of grafts against density and of packs against size, of the
    last set, as far as they are there."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "path"  # which the pages of reports may have changed
    from matplotlib import pyplot

    name, found = list(results.items())[-1]
    panels = [("merges", 9)] + [(x, 5) for x in ("grafts", "packs") if getattr(found, x)]
    width = sum(size for _, size in panels)
    drawing, places = pyplot.subplots(
        1,
        len(panels),
        figsize=(width, 5),
        layout="constrained",
        squeeze=False,
        width_ratios=[size for _, size in panels],
    )
    for (panel, _), axes in zip(panels, places[0], strict=True):
        axes.set_title(f"{panel}, set {name}")
        axes.grid(alpha=0.3)
        {"merges": _draw_merges, "grafts": _draw_grafts, "packs": _draw_packs}[panel](axes, found, methods)
    drawing.savefig(path)
    pyplot.close(drawing)


def _draw_merges(axes, found: Results, methods: Sequence[Method]) -> None:
    drawn = 0
    for method in methods:
        scored = [s for s in found.merges.get(method.label, {}).values() if s.length]
        points = sorted((s.length, found.scale.mean(s)) for s in scored)
        if len(points) > 2:
            style = {"color": f"C{drawn % 10}", "linestyle": ("-", "--", ":")[drawn // 10 % 3]}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=method.label, **style)
            drawn += 1
    axes.set(
        xlabel="length of the merged edit / mean length of the experts' edits",
        ylabel="% of the experts' accuracy",
    )
    if drawn:
        axes.legend(
            fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, handlelength=3
        )


def _draw_grafts(axes, found: Results, methods: Sequence[Method]) -> None:
    for by in ("ffg", "magnitude"):
        at = [d for d in DENSITIES if (by, d) in found.grafts]
        gains = [[found.scale.gain(t, s) for t, s in found.grafts[by, d].items()] for d in at]
        axes.plot(at, [sum(g) / len(g) for g in gains], marker="o", label=by)
    axes.set(xlabel="density", ylabel="% of the expert's gain", xscale="log")
    axes.set_xticks(DENSITIES, [f"{d:g}" for d in DENSITIES])
    axes.minorticks_off()
    axes.legend()


def _draw_packs(axes, found: Results, methods: Sequence[Method]) -> None:
    tasks = found.scale.tasks
    for label, of_task in found.packs.items():
        gains = [found.scale.gain(t, of_task[t]) for t in tasks]
        at = sum(of_task[t].bits for t in tasks) / len(tasks), sum(gains) / len(tasks)
        axes.plot(*at, marker="o")
        axes.annotate(label, at, fontsize="x-small")
    axes.set(xlabel="bits per parameter", ylabel="% of the expert's gain")
