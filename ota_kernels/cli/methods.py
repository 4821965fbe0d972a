"""`ota-merge methods`: the table of merge methods, or one of them with its keys."""

from __future__ import annotations

from typing import Any

import click

from ..recipe import methods as table
from ..recipe.methods import Method
from ..recipe.parameters import REQUIRED, Parameter, value_text
from ..recipe.settings import Settings


@click.command()
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="The table as README has it.")
def methods(name: str | None, markdown: bool) -> None:
    """List the merge methods, or show one: its formula, its keys with defaults, a recipe."""
    if name is not None:
        click.echo(_one(table.get(name)))
        return
    rows = [table.get(each) for each in table.names()]
    if markdown:
        click.echo("| name | formula | base | models beside a base | curvature | passes | from |")
        click.echo("|---|---|---|---|---|---|---|")
        for row in rows:
            formula, curvature = row.formula.replace("|", "\\|"), _curvature(row)
            needs = f"{row.base} | {_count(row)} | {curvature} | {_passes(row)}"
            click.echo(f"| `{row.name}` | {formula} | {needs} | {row.source} |")
        return
    width = max(len(row.name) for row in rows)
    for row in rows:
        click.echo(f"{row.name:{width}}  {row.formula}")


def _count(row: Method) -> str:
    if row.most is None:
        return f"{row.least} or more"
    return str(row.least) if row.least == row.most else f"{row.least} to {row.most}"


def _curvature(row: Method) -> str:
    return "" if not row.curvature else "optional" if row.curvature_optional else "yes"


def _passes(row: Method) -> int:
    """Reads of the inputs, where every density is 0.5 and nothing else is asked for."""
    usual = {"density": 0.5, "select_topk": 0.5}

    def value(p: Parameter) -> Any:
        return usual.get(p.key, 0.5 if p.default is REQUIRED else p.default)

    own = [{p.key: value(p) for p in row.own}] * max(row.least, min(2, row.most or 2))
    settings = Settings.of(row.name, row.base != "ignored", {p.key: value(p) for p in row.shared}, own)
    whole = 0 if row.matrix(settings) is None else 2
    return 1 + whole + sum(n.reads for n in row.needs(settings) if n.statistic != "thresholds")


def _default(parameter: Parameter) -> str:
    if parameter.default is REQUIRED:
        return "required"
    return "not set" if parameter.default is None else value_text(parameter.default)


def _one(row: Method) -> str:
    lines = [f"{row.name} ({row.source}): {row.formula}", f"base: {row.base}; models: {_count(row)}"]
    lines += [f"passes over the inputs: {_passes(row)}; shown: {row.shown or 'by its own authors only'}", ""]
    for p in row.by_key.values():
        of = "each model's" if p.level == "expert" else "of the merge"
        lines.append(f"  {p.key}: {p.help} ({p.kind.allowed}; {of}; default: {_default(p)})")
    own = [p for p in row.parameters if p.level == "expert" and p.default is REQUIRED]
    own += [p for p in row.parameters if p.key == "preconditioner_path" and not row.curvature_optional]
    shared = [p for p in row.parameters if p.level == "shared" and p.default is REQUIRED]
    lines += ["", f"merge_method: {row.name}"]
    lines += ["base_model: models/base"] if row.base == "required" else []
    lines.append("models:")
    for i in range(max(row.least, min(2, row.most or 2))):
        lines.append(f"  - model: models/expert{i + 1}")
        if own:
            lines.append("    parameters:")
            values = {"preconditioner_path": f"models/expert{i + 1}/exp_avg_sq.safetensors"}
            lines += [f"      {p.key}: {values.get(p.key, 0.5)}" for p in own]
    if shared:
        lines.append("parameters:")
        lines += [f"  {p.key}: 0.5" for p in shared]
    lines.append("dtype: bfloat16")
    return "\n".join(lines)
