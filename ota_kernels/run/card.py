"""README.md of a merged model: what it was made of, and how, for people and for the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath
from typing import Any

import yaml

from ..sizes import format_count

# What the Hub accepts in `base_model`; it refuses a whole README.md over one entry that is not.
_HUB_PART = r"\w(?:[\w.-]*\w)?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.))(?:{_HUB_PART}/)?{_HUB_PART}", re.ASCII)

_CITATION = """\
@misc{mahdavinia2025ota,
  title  = {Harnessing Optimization Dynamics for Curvature-Informed Model Merging},
  author = {Mahdavinia, Pouria and Mahdavi, Hamed and Mireshghallah, Niloofar and Mahdavi, Mehrdad},
  year   = {2025},
  eprint = {2509.11167},
  archivePrefix = {arXiv},
}"""


def model_card(recipe: dict, report: dict, version: str, *, formula: str, has_config: bool) -> str:
    """The text of README.md.

    recipe: `Recipe.as_dict()`; report: merge_report.json, of which `experts` is used, a list of
    {"model", "threshold" (or None), "kept", "total", "density"}; version: of ota_kernels;
    formula: the method's, `Method.formula`; has_config: whether transformers can load the folder.

    Absolute paths of this machine appear as their last component only.
    """
    return "\n\n".join(
        (
            _front_matter([_base(recipe), *_models(recipe)], has_config),
            "# Merged model",
            _summary(recipe, version),
            "## Method",
            f"    out = {formula}",
            "## Models",
            _experts_table(report["experts"]),
            "## Recipe",
            _fenced("yaml", yaml.safe_dump(_without_folders(recipe), sort_keys=False, allow_unicode=True)),
            "## Citation",
            _fenced("bibtex", _CITATION) + "\n",
        )
    )


def _path(model: str | dict) -> str:
    """What a recipe names a model by, without revision or adapter where it is a mapping."""
    return model["model"]["path"] if isinstance(model, dict) else model


def _base(recipe: dict) -> str | None:
    base = recipe.get("base_model")
    return None if base is None else _path(base)


def _models(recipe: dict) -> list[str]:
    """The models of `models`, or of all slices and modules, each once."""
    parts = [recipe, *recipe.get("modules", {}).values()]
    parts += [part for whole in parts for part in whole.get("slices", ())]
    entries = (entry for part in parts for entry in (*part.get("models", ()), *part.get("sources", ())))
    return [_path(entry["model"]) for entry in entries]


def _front_matter(names: list[str | None], has_config: bool) -> str:
    ids = dict.fromkeys(hub_id for name in names if name and (hub_id := _hub_id(name)))
    fields: dict[str, Any] = {}
    if ids:
        fields["base_model"] = list(ids)
    if has_config:
        fields["library_name"] = "transformers"
    fields["tags"] = ["merge", "ota_kernels"]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _hub_id(name: str) -> str | None:
    """`name`, or the last component where it is a folder, if the Hub would accept that."""
    is_folder = name.startswith(("/", "~", ".")) or os.path.isdir(name)
    shown = PurePosixPath(name).name if is_folder else name
    return shown if _HUB_ID.fullmatch(shown) else None


def _summary(recipe: dict, version: str) -> str:
    count = len(recipe["models"]) if "models" in recipe else len(set(_models(recipe)))
    base = _base(recipe)
    onto = f" (base model: {_escaped(_without_folders(base))})" if base else ""
    return (
        f"A merge of {count} model{'s' if count != 1 else ''}{onto}, made without training by "
        f"ota_kernels {version} with the method `{recipe['merge_method']}`."
    )


def _experts_table(experts: list[dict]) -> str:
    rows = ["| model | threshold | kept | density |", "|---|---|---|---|"]
    for expert in experts:
        threshold = "none" if expert["threshold"] is None else f"{expert['threshold']:.4g}"
        kept = f"{format_count(expert['kept'])} of {format_count(expert['total'])}"
        name = _escaped(_without_folders(expert["model"]))
        rows.append(f"| {name} | {threshold} | {kept} | {100 * expert['density']:.3g} % |")
    return "\n".join(rows)


def _without_folders(value: Any) -> Any:
    """`value` with every absolute path in it cut to its last component: a card is published."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return PurePosixPath(value).name
    return value


def _escaped(text: str) -> str:
    """`text` on one line, with the characters that Markdown or a table would interpret escaped."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
