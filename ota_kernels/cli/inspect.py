"""`ota-merge inspect`: what a model is, as a merge would understand it."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="FOLDER_OR_FILE...")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def inspect(paths: tuple[str, ...], as_json: bool) -> None:
    """Show what each model is: kind, architecture, types, quantisation, tied and extra tensors, vocabulary,
    completeness; of several, what differs. Its checks are those of `plan` and `run`. Reads headers only.

    Exit code 2 where a model, or the models together, could not be merged.
    """
    from .. import inspection

    found = inspection.inspect(paths)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for model in found["models"]:
            _print(model["model"], _rows(model))
        if "together" in found:
            _print("together", _rows_together(found["together"]))
    together = found.get("together", {"problem": None, "differences": []})
    if together["problem"] or together["differences"] or any(model["problem"] for model in found["models"]):
        raise SystemExit(2)


def _print(title: str, rows: list[tuple[str, str]]) -> None:
    click.echo(title)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        click.echo(f"  {name:<{width}}  {text}")


def _rows(model: dict[str, Any]) -> list[tuple[str, str]]:
    from ..sizes import format_bytes, format_count

    rows = [("kind", model.get("kind", "unknown"))]
    if "tensors" in model:
        architecture = ", ".join(model["architectures"]) or "not said"
        types = ", ".join(f"{format_count(n)} {name}" for name, n in model["types"].items())
        rows += [
            ("architecture", f"{architecture} ({model['model_type'] or 'no model_type'})"),
            ("tensors", f"{model['tensors']} in {model['files']} file(s), {format_bytes(model['bytes'])}"),
            ("elements", types or "none"),
            ("quantisation", _quantisation(model)),
            ("embeddings", _embeddings(model)),
            ("tokenizer", _tokenizer(model)),
        ]
        if list(model["parts"]) != ["."]:
            rows.append(("parts", ", ".join(model["parts"])))
        if model["buffers"]:
            rows.append(("buffers", ", ".join(f"{n} {kind}" for kind, n in model["buffers"].items())))
        rows += [("contradicts", line) for line in model["contradictions"]]
    rows.append(("problem", model["problem"]) if model["problem"] else ("complete", "yes"))
    return rows


def _quantisation(model: dict[str, Any]) -> str:
    if "quantisation" in model:
        return model["quantisation"]
    claim = model["claims_quantisation"]
    return f"none, though config.json says {claim}" if claim else "none"


def _embeddings(model: dict[str, Any]) -> str:
    said = {True: "tied", False: "not tied", None: "ties not said"}[model["tied_in_config"]]
    rows = [f"{name} has {n} rows" for name, n in model["rows"].items()]
    heads = [f"{name} is {what}" for name, what in model["output_matrices"].items()]
    return "; ".join([*rows, *heads, f"in config.json: {said}"])


def _tokenizer(model: dict[str, Any]) -> str:
    if not model["tokenizer"]:
        return "none"
    tokens = f"{model['tokens']} tokens" if model["tokens"] is not None else "tokens not readable"
    template = "with" if model["chat_template"] else "without"
    return f"{tokens}, {template} a file of chat templates: {', '.join(model['tokenizer'])}"


def _rows_together(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("problem", found["problem"])] if found["problem"] else []
    rows += [("differs", line) for line in found["differences"]]
    rows += [("note", line) for line in found["notes"]]
    if not found["problem"] and not found["differences"]:
        rows.insert(0, ("differs", "nothing that a merge refuses"))
    return rows
