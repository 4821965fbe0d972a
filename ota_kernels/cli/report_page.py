"""A merge's report as one HTML file: no script, nothing that is fetched."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import yaml

from ..planning.roles import DETAILED_ROLES
from .report_pictures import heat_map, lines

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2329; --soft: #5b6672; --paper: #fff; --edge: #d7dce1; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa5b1; --paper: #14181c; --edge: #313941; --card: #1b2127; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem;
  color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; border-top: 1px solid var(--edge); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
p { max-width: 46rem; margin: .4rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; } .pair { display: grid; gap: 1rem 2rem; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 900px) { .pair { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .2rem .7rem .2rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--edge); }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 600; }
svg { display: block; max-width: none; height: auto; } @media (min-width: 700px) { svg { max-width: 100%; } }
svg text { font-family: system-ui, sans-serif !important; }
ul.warn { list-style: none; padding: .6rem 1rem; margin: 1rem 0; background: var(--card);
  border-left: 4px solid #c8553d; }
pre { background: var(--card); padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
details summary { cursor: pointer; color: var(--soft); margin: .4rem 0; }
"""


def page(found: dict[str, Any], title: str) -> str:
    """HTML of what `run.analysis.analyse` found."""
    report, overall = found["report"], found["overall"]
    names = _names([e["model"] for e in report["experts"]])
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="soft">{_text(_summary(report, found["automatic"]))}</p>',
        _warnings(found, names),
        _experts(report, overall, names),
        _kept_maps(found, names),
        _pairs(overall, names),
        _lengths(found, names),
        _ranks(found, names),
        _how(found),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _names(models: Sequence[str]) -> list[str]:
    """The shortest ends of paths that tell models apart."""
    for depth in range(1, 8):
        ends = ["/".join(PurePath(m).parts[-depth:]) for m in models]
        if len(set(ends)) == len(ends):
            return ends
    return [f"{i}: {m}" for i, m in enumerate(models)]


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str) -> str:
    cells = "".join(f'<th scope="col">{_text(h)}</th>' for h in head)
    body = "".join(
        f'<tr><th scope="row">{_text(first)}</th>' + "".join(f"<td>{_text(c)}</td>" for c in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<p class="soft">{_text(caption)}</p><div class="wide"><table>'
        f"<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _percent(part: float, whole: float) -> str:
    return "-" if not whole else f"{100 * part / whole:.3g}"


def _summary(report: dict, automatic: float | None) -> str:
    elements = sum(t["elements"] for t in report["tensors"].values())
    scale = report.get("lambda")
    used = ""
    if scale:
        own = "by tensor" if scale["used"] is None else f"{scale['used']:.4g}"
        exact = "" if automatic is None else f" ({automatic:.4g} by all elements)"
        used = f" Lambda {own}; automatic: {scale['auto']:.4g}{exact}."
    return (
        f"{report['method']}, {len(report['experts'])} experts, {len(report['tensors'])} tensors of "
        f"{elements:,} elements; merged by {', '.join(report['backends'])} in "
        f"{sum(report['seconds'].values()):.3g} s.{used}"
    )


def _cosines(overall: dict) -> np.ndarray:
    return _normalised(np.array(overall["gram"]))


def _normalised(products: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.maximum(np.diag(products), 0))
    scale = np.outer(norms, norms)
    return np.divide(products, scale, out=np.full_like(products, np.nan), where=scale > 0)


def _warnings(found: dict, names: list[str]) -> str:
    report, overall = found["report"], found["overall"]
    said = [n for n in report.get("notes", ()) if "merged edit is" in n]
    cosines = _cosines(overall)
    for s in range(len(names)):
        for t in range(s):
            if cosines[s, t] > 0.98:
                said.append(
                    f"{names[t]} and {names[s]} are nearly equal: their edits' cosine is {cosines[s, t]:.4f}"
                )
    for name, expert in zip(names, report["experts"], strict=True):
        if expert["missing"]:
            said.append(f"{name}: its density asks for {expert['missing']:,} more edits than have a saliency")
    for t, name in enumerate(names):
        if not overall["changed"][t]:
            said.append(f"{name} is the base: it has no edits")
    items = "".join(f"<li>{_text(line)}</li>" for line in said)
    return f'<ul class="warn" aria-label="Warnings">{items}</ul>' if said else ""


def _experts(report: dict, overall: dict, names: list[str]) -> str:
    elements, gram = overall["elements"], np.array(overall["gram"])
    rows = []
    for t, (name, expert) in enumerate(zip(names, report["experts"], strict=True)):
        threshold = "-" if expert["threshold"] is None else f"{expert['threshold']:.3g}"
        rows.append(
            [name, _percent(overall["kept"][t], elements),
             _percent(overall["kept"][t], overall["changed"][t]),
             _percent(elements - overall["changed"][t], elements), f"{math.sqrt(gram[t, t]):.4g}", threshold]
        )  # fmt: skip
    length = math.sqrt(overall["merged"])
    if length:
        rows.append(
            ["merged", _percent(elements - overall["keepers"][0], elements), "-", "-", f"{length:.4g}", "-"]
        )
    head = ["expert", "kept, % of elements", "% of its edits", "unchanged weights, %", "length", "threshold"]
    return "<h2>Experts</h2>" + _table(
        head,
        rows,
        "An edit is a weight that differs from the base's; its length is the root of the sum of squares.",
    )


def _kept_maps(found: dict, names: list[str]) -> str:
    groups = found["groups"]
    layers = list(dict.fromkeys(g["layer"] for g in groups))
    roles = [r for r in DETAILED_ROLES if any(g["role"] == r for g in groups)]
    out = [
        "<h2>What is kept, by layer and role</h2>",
        "<p>Percent of the elements of a role in a layer.</p>",
        '<div class="pair">',
    ]
    for t, name in enumerate(names):
        values = np.full((len(layers), len(roles)), np.nan)
        for g in groups:
            if g["elements"]:
                values[layers.index(g["layer"]), roles.index(g["role"])] = 100 * g["kept"][t] / g["elements"]
        labels = ["outside" if x == "none" else x for x in layers]
        picture = heat_map(labels, roles, values, f"Share of edits kept of {_text(name)}, by layer and role")
        rows = [
            [label, *("-" if math.isnan(v) else f"{v:.3g}" for v in row)]
            for label, row in zip(labels, values, strict=True)
        ]
        table = _table(["layer", *roles], rows, f"{name}: percent kept")
        out.append(
            f'<section><h3>{_text(name)}</h3><div class="wide">{picture}</div>'
            f"<details><summary>as a table</summary>{table}</details></section>"
        )
    return "\n".join([*out, "</div>"])


def _pairs(overall: dict, names: list[str]) -> str:
    if len(names) < 2:
        return ""
    both, opposed, kept = np.array(overall["both"]), np.array(overall["opposed"]), overall["kept"]
    union = np.add.outer(np.array(kept), np.array(kept)) - both
    tables = [
        (_cosines(overall), "Cosines of edits", "1: the same direction; near 0: different things."),
        (np.divide(both, union, out=np.full_like(both, np.nan), where=union > 0), "Overlap of masks",
         "Elements that both keep, of those that either keeps."),
        (np.divide(opposed, both, out=np.full_like(both, np.nan), where=both > 0), "Sign disagreement",
         "Of the elements that both keep, the share where they pull apart."),
        (_normalised(np.array(overall["moments"])), "Overlap of curvature",
         "Cosines of second moments: where both are sure of the same weights, merging has to choose."),
    ]  # fmt: skip
    out = ["<h2>Pairs of experts</h2>", '<div class="pair">']
    for values, title, caption in tables:
        if not np.isfinite(values).any():
            continue
        rows = [
            [n, *("-" if math.isnan(v) else f"{v:.3f}" for v in row)]
            for n, row in zip(names, values, strict=True)
        ]
        out.append(f"<section><h3>{title}</h3>{_table(['', *names], rows, caption)}</section>")
    out.append("</div>")
    rows = [[k, f"{c:,}", _percent(c, overall["elements"])] for k, c in enumerate(overall["keepers"])]
    out.append(_table(["kept by so many experts", "elements", "%"], rows, "How masks lie over each other"))
    return "\n".join(out)


def _lengths(found: dict, names: list[str]) -> str:
    groups = found["groups"]
    layers = list(dict.fromkeys(g["layer"] for g in groups))
    edits = np.zeros((len(names), len(layers)))
    merged = np.zeros(len(layers))
    for g in groups:
        i = layers.index(g["layer"])
        edits[:, i] += np.diag(np.array(g["gram"]))
        merged[i] += g["merged"]
    series, labels = np.sqrt([*edits, merged]), [*names, "merged"]
    if not merged.any():
        series, labels = series[:-1], labels[:-1]
    x = ["outside" if layer == "none" else layer for layer in layers]
    picture = lines(labels, x, series.tolist(), "length of the edit", "Lengths of edits by layer")
    rows = [[label, *(f"{v:.3g}" for v in row)] for label, row in zip(labels, series, strict=True)]
    return (
        f'<h2>Lengths by layer</h2><div class="wide">{picture}</div>'
        f"<details><summary>as a table</summary>{_table(['', *x], rows, 'Length of the edit')}</details>"
    )


def _ranks(found: dict, names: list[str]) -> str:
    ranks = found["ranks"]
    if not ranks or len(ranks[0]["edits"]) != len(names):
        return ""
    head = ["matrix", *(f"{n}: {what}" for n in names for what in ("edit", "mask"))]
    rows = [
        [r["tensor"], *(f"{v:.1f}" for pair in zip(r["edits"], r["masks"], strict=True) for v in pair)]
        for r in ranks
    ]
    return "<h2>Effective ranks</h2>" + _table(
        head,
        rows,
        "exp of the entropy of singular values, of kept edits and of masks; smaller side up to 1024.",
    )


def _how(found: dict) -> str:
    recipe = yaml.safe_dump(found["recipe"], sort_keys=False, allow_unicode=True)
    notes = "".join(f"<li>{_text(n)}</li>" for n in found["report"].get("notes", ()))
    listed = f"<h3>Notes</h3><ul>{notes}</ul>" if notes else ""
    return f"<h2>How it was merged</h2><pre>{_text(recipe)}</pre>{listed}"
