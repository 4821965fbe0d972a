"""The methods of this package inside of mergekit 0.1.5, by its public registry.

    python -m ota_kernels.integrations.mergekit RECIPE OUT [--replace] [options of mergekit-yaml]

`register()` adds what mergekit lacks (`ota`, `tsv`, `consensus`, ...) under the names that recipes here use,
with their keys; `register(replace=True)` also has its own methods (`ties`, `linear`, `slerp`, ...) computed
here. mergekit merges one tensor after the other: what is counted over the whole model is refused, with what
to give instead.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..api import merge_tensors
from ..arguments import recipe_of
from ..errors import InputError, OtaError, RecipeError
from ..io.curvature import CurvatureFile
from ..recipe import methods
from ..recipe.methods import Method
from ..recipe.needs import Needs
from ..recipe.parameters import REQUIRED, Parameter
from ..recipe.settings import Settings

if TYPE_CHECKING:
    import torch

# Which checkpoints of a run there are is a matter of files; models of a slice are given one by one.
_OF_FOLDERS = ("every", "last")


def register(replace: bool = False) -> tuple[str, ...]:
    """Make the methods known to mergekit, in this process. replace: have mergekit's own methods of the same
    names computed here too, with the same results but for rounding, and other draws of random numbers.
    Returns the names that are now computed here. RecipeError without mergekit 0.1.5 or newer. May be called
    again."""
    try:
        from mergekit.merge_methods import base, get, registered_methods
        from mergekit.merge_methods import register as add
    except ImportError as error:
        raise RecipeError(
            f"mergekit 0.1.5 is not installed ({error}): pip install 'ota-kernels[mergekit]'"
        ) from None
    theirs = {method.spec.name for method in registered_methods()}
    found = []
    for name in methods.names():
        row = methods.get(name)
        if name not in theirs:
            add(base.FunctionalGroupMergeMethod(_spec(row, base), _implementation(row)))
        elif isinstance(getattr(get(name), "_ota_kernels", None), str):
            pass
        elif replace:
            _replace(get(name), row)
        else:
            continue
        found.append(name)
    return tuple(found)


def _keys(row: Method) -> list[Parameter]:
    """The parameters that mean something for one tensor."""
    own = [p for p in row.parameters if p.key not in _OF_FOLDERS]
    return own + ([row.by_key["calibrate"]] if "calibrate" in row.by_key else [])


def _spec(row: Method, base: Any) -> Any:
    """mergekit's description of a row. Values are checked here, so that it passes them as they are."""
    scope = base.ParameterScope
    of_expert = scope.INPUT if row.base == "ignored" else scope.NON_BASE
    parameters = tuple(
        base.ParameterSpec(
            name=p.key,
            value_type=Any,
            scope=of_expert if p.level == "expert" else scope.SHARED,
            description=p.help,
            **({} if p.default is REQUIRED else {"default": None}),
        )
        for p in _keys(row)
    )
    with_base = row.base == "required"
    contract = base.InputContract(
        base=base.BasePolicy(row.base),
        min_inputs=max(row.least, 1) + with_base,
        max_inputs=None if row.most is None else row.most + with_base,
    )
    return base.MergeMethodSpec(
        name=row.name, parameters=parameters, contract=contract, pretty_name=f"{row.name} (ota-kernels)"
    )


def _implementation(row: Method) -> Callable[..., torch.Tensor]:
    def merge(group: Any, /, **parameters: Any) -> torch.Tensor:
        entries = [entry for entry in group.entries if row.base == "ignored" or not entry.is_base]
        base = next((entry.tensor for entry in group.entries if entry.is_base), None)
        values = {
            key: value.values_for(entries) if hasattr(value, "values_for") else value
            for key, value in parameters.items()
        }
        experts = [entry.tensor for entry in entries]
        labels = [str(entry.id) for entry in entries]
        return merged(
            row, None if row.base == "ignored" else base, experts, labels, group.metadata.name, values
        )

    return merge


def merged(
    row: Method,
    base: torch.Tensor | None,
    experts: Sequence[torch.Tensor],
    labels: Sequence[str],
    name: str | None,
    values: Mapping[str, Any],
) -> torch.Tensor:
    """One output tensor. values: by recipe key, a list has one of each expert; None: not given."""
    given: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list):
            if all(each is None for each in value):
                continue
            if None in value:
                raise RecipeError(f"`{key}` is given for some models only: give it for all of them")
        elif value is None:
            continue
        given[key] = value
    paths, correct = given.pop("preconditioner_path", None), given.pop("bias_correction", False)
    name = name or "weight"
    curvatures = None if paths is None else _curvatures(paths, labels, name, bool(correct), experts)
    if curvatures is not None and None in curvatures:
        policy = given.get("missing_curvature", "error")
        if policy == "error":
            lacking = paths[curvatures.index(None)]
            raise InputError(
                f"{lacking} has no {name!r}; `missing_curvature: uniform` or `base` merges without it"
            )
        if policy == "base":
            if base is None:
                raise RecipeError("`missing_curvature: base` needs a base_model")
            return base.clone()
        curvatures = None
    needed = row.curvature and not row.curvature_optional
    if needed and paths is None and given.get("missing_curvature", "error") != "uniform":
        raise RecipeError(
            f"`{row.name}` needs each model's `preconditioner_path`, or `missing_curvature: uniform`"
        )
    _refuse_whole_model(row, base is not None, len(experts), given)
    return merge_tensors(base, list(experts), curvatures, method=row.name, name=name, **_keywords(given))


def _keywords(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"lambda_" if key == "lambda" else key: value for key, value in given.items()}


def _refuse_whole_model(row: Method, has_base: bool, n: int, given: Mapping[str, Any]) -> None:
    """RecipeError for what is counted over the whole model, which nobody has here."""
    recipe = recipe_of(has_base, n, row.curvature, row.name, None, dict(given))
    part = recipe.slices[0]
    shared = {p.key: part.shared.get(p.key) for p in row.shared}
    experts = [{p.key: entry.parameters.get(p.key) for p in row.own} for entry in part.experts]
    settings = Settings.of(row.name, has_base, shared, experts)
    whole = [need.statistic for need in Needs.of(row, [settings]).everything if need.scope == "model"]
    whole += ["the length of the merged edit"] if settings.scaled else []
    if whole:
        hints = {"thresholds": "`density_scope: tensor`", "mean weight": "`normalise: global`"}
        hint = hints.get(whole[0])
        advice = f"give {hint}, or " if hint else ""
        raise RecipeError(
            f"`{row.name}` takes {whole[0]} over the whole model, and mergekit merges tensor by tensor: "
            f"{advice}run the recipe with `ota-merge run`"
        )


@functools.lru_cache(maxsize=64)
def _opened(path: str, label: str) -> CurvatureFile:
    return CurvatureFile.open(Path(path), label)


def _curvatures(
    paths: Sequence[str], labels: Sequence[str], name: str, correct: bool, experts: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Second moments as float32, where the experts are; None where a file has none of this name."""
    from ..backends import torch_words

    found: list[torch.Tensor | None] = []
    for path, label, expert in zip(paths, labels, experts, strict=True):
        held = _opened(str(path), label).held(name, correct)
        if held is None:
            found.append(None)
            continue
        if held.shape != tuple(expert.shape):
            raise InputError(f"{path}: {name} has shape {list(held.shape)}, the tensor {list(expert.shape)}")
        h = torch_words.curvature(held.curvature, expert.numel()) / held.curvature.bias_correction
        found.append(h.reshape(expert.shape).to(expert.device))
    return found


def _replace(method: Any, row: Method) -> None:
    """Have one of mergekit's methods computed here, by its public entry."""
    ours = _implementation(row)
    if hasattr(method, "merge_batch"):
        entry, call = "merge_batch", functools.partial(_batch, row)
    else:
        entry, call = "merge_group", ours
    try:
        setattr(method, entry, call)
        method._ota_kernels = row.name
    except AttributeError:  # a frozen instance: its class is told
        kind, theirs = type(method), getattr(type(method), entry)
        if getattr(theirs, "_ota_kernels", False):
            return

        def dispatch(self: Any, group: Any, /, **parameters: Any) -> torch.Tensor:
            if self.spec.name not in methods.names():
                return theirs(self, group, **parameters)
            return _implementation(methods.get(self.spec.name))(group, **parameters)

        dispatch._ota_kernels = True
        setattr(kind, entry, dispatch)


def _batch(row: Method, batch: Any, /, **parameters: Any) -> torch.Tensor:
    """Outputs one by one: [outputs, *shape]. Coefficients are [outputs], or [outputs, inputs]."""
    import torch

    tensors, at = batch.tensors, batch.base_index
    has_base = at is not None and row.base != "ignored"
    inputs = [i for i in range(len(tensors)) if not (has_base and i == at)]
    found = []
    for j in range(len(tensors[0])):
        values = {
            key: value[j].tolist() if isinstance(value, torch.Tensor) else value
            for key, value in parameters.items()
        }
        base = tensors[at][j] if has_base else None
        experts = [tensors[i][j] for i in inputs]
        labels = [f"models[{i}]" for i in inputs]
        found.append(merged(row, base, experts, labels, None, values))
    return torch.stack(found)


def main() -> None:
    """mergekit-yaml's command line, after `register`."""
    arguments = sys.argv[1:]
    try:
        register(replace="--replace" in arguments)
    except OtaError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    from mergekit.scripts.run_yaml import main as run

    sys.argv[1:] = [argument for argument in arguments if argument != "--replace"]
    run()


if __name__ == "__main__":
    main()
