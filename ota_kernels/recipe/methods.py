"""The table of merge methods: one row each. A row is words (tensors/terms.py), its own parameters, and two
pure functions."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import RecipeError
from ..spectral.formulas import Formula
from ..tensors.found import Found, Rank
from ..tensors.terms import Terms
from ..tensors.tile import TensorInputs
from .parameters import FINITE, TEXT, Parameter, choice, suggest
from .settings import Settings

EXTRA_TENSORS = Parameter(
    "extra_tensors",
    choice("error", "take", "drop", "average"),
    "error",
    "tensors that only some models have: an error (buffers are taken), or take the first model's, drop them, "
    "or their average",
    varies=False,
)

# Of every row that adds edits to a base.
CALIBRATE = Parameter(
    "calibrate",
    choice("none", "svc", "shrink"),
    "none",
    "svc: no singular direction of a merged matrix is counted too often; shrink: the same, and none grows",
)

# Of rows that add edits to a base, and of rows whose models have weights.
LAYERS = Parameter(
    "layers",
    FINITE,
    None,
    "a factor of the merged edit; [a, b]: from a in the first layer to b in the last, a outside (LiNeS)",
    affects="values",
)
WEIGHTS_PATH = Parameter(
    "weights_path",
    TEXT,
    None,
    "in place of `weight`: a table of them per tensor and model, as JSON {tensor: [..]} or safetensors",
    varies=False,
    affects="values",
)


class Need(NamedTuple):
    """A statistic that must be known before a tensor merges, by its name in run/statistics.py.

    scope: over one "tensor" or the whole "model"; reads: of the inputs; of_masks: whether it looks at what
    thresholds keep, which then must be known before, and cannot be settled after the merge.
    """

    statistic: str
    scope: str = "tensor"
    reads: int = 1
    of_masks: bool = False


@dataclass(frozen=True)
class Method:
    """What a merge method needs and which recipe keys it accepts.

    formula: one line in the symbols of README, "Methods"; source: the paper, or where it is from; shown:
    where others tried it; base: "required", "optional" or "ignored" (there it is one more model); edits:
    whether it adds edits to a base, so that `origin` and `layers` mean something; of_one_run: whether its
    models are checkpoints of one run, oldest first, and the newest gives what is not floating point;
    parameters: its keys, each of which may stand at every level of a recipe, those of an expert also under a
    model; least, most: models beside a base; absent: what becomes of a tensor that some models lack (METHODS,
    "optional tensors").

    Pure functions: terms: what the kernels compute for a tensor, from its settings and what was found; needs:
    what must be known before a tensor merges, read after read; ranks: the places of expert t's scores that
    "ranks" finds, of n elements, `nonzero` of which are not 0; groups: of what "gram" is taken; view: the
    tensor as the kernels see it; check: what is wrong with the settings of a tensor, None where nothing is;
    keeps_base: whether a tensor of a role takes the base's values; copies: whether it is its only expert's.
    matrix: what becomes of whole matrices, in place of `terms`, which then say what is kept of their edits.
    curvature_optional: without any second moments all curvature is 1, unasked.

    identity: what a recipe does not say of a user's method: a merge by another one is not gone on with;
    python: whether its terms are a function of torch tensors.
    """

    name: str
    formula: str
    base: str
    parameters: tuple[Parameter, ...]
    terms: Callable[[Settings, Found], Terms]
    needs: Callable[[Settings], list[Need]] = lambda settings: []
    ranks: Callable[[Settings, int, int, int], list[Rank]] = lambda settings, t, n, nonzero: []
    groups: Callable[[Settings, tuple[int, ...]], str] = lambda settings, shape: "tensor"
    view: Callable[[TensorInputs, Settings], TensorInputs] = lambda tensor, settings: tensor
    check: Callable[[Settings], str | None] = lambda settings: None
    keeps_base: Callable[[Settings, str], bool] = lambda settings, role: False
    copies: Callable[[Settings], bool] = lambda settings: False
    matrix: Callable[[Settings], Formula | None] = lambda settings: None
    curvature_optional: bool = False
    source: str = ""
    shown: str = ""
    edits: bool = True
    of_one_run: bool = False
    least: int = 2
    most: int | None = None
    absent: str = "merge"
    identity: str = ""
    python: bool = False

    @functools.cached_property
    def by_key(self) -> dict[str, Parameter]:
        """The parameters by their keys, in order, and those that not only this method has."""
        return {p.key: p for p in (*self.parameters, *self.options, EXTRA_TENSORS)}

    @functools.cached_property
    def options(self) -> tuple[Parameter, ...]:
        """The parameters that follow from what the row does."""
        weighted = any(p.key == "weight" and p.kind is FINITE for p in self.parameters)
        calibrated = self.base != "ignored"
        return (CALIBRATE,) * calibrated + (LAYERS,) * self.edits + (WEIGHTS_PATH,) * weighted

    @property
    def keys(self) -> frozenset[str]:
        """Every key that the method accepts somewhere."""
        return frozenset(self.by_key)

    @functools.cached_property
    def shared(self) -> tuple[Parameter, ...]:
        """The parameters that all experts share."""
        return tuple(p for p in self.by_key.values() if p.level == "shared")

    @functools.cached_property
    def own(self) -> tuple[Parameter, ...]:
        """The parameters of which each expert has its own."""
        return tuple(p for p in self.parameters if p.level == "expert")

    def whole(self, settings: Settings) -> bool:
        """Whether matrices are merged whole."""
        return self.matrix(settings) is not None or settings.shared.get("calibrate", "none") != "none"

    @property
    def curvature(self) -> bool:
        """Whether each model brings second moments."""
        return "preconditioner_path" in self.by_key


_REGISTRY: dict[str, Method] = {}


def register(method: Method) -> None:
    """Add a row; a name that is taken raises ValueError, but for a user's own, which a later one replaces."""
    if method.name in _REGISTRY and not (method.identity and _REGISTRY[method.name].identity):
        raise ValueError(f"the merge method `{method.name}` is registered twice")
    _REGISTRY[method.name] = method


@contextlib.contextmanager
def registered(method: Method) -> Iterator[Method]:
    """A row for as long as a block lasts, as tests try one."""
    register(method)
    try:
        yield method
    finally:
        del _REGISTRY[method.name]


def get(name: str) -> Method:
    """The row called name; RecipeError names the nearest one when there is none."""
    _fill()
    if name not in _REGISTRY:
        raise RecipeError(f"unknown merge_method {name!r}; {suggest(name, _REGISTRY)}")
    return _REGISTRY[name]


def names() -> tuple[str, ...]:
    """Every registered name, sorted."""
    _fill()
    return tuple(sorted(_REGISTRY))


def _fill() -> None:
    """The rows are modules that register themselves; they need this one."""
    from . import rows  # noqa: F401
