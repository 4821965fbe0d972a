"""What `ota-merge pack` is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import RecipeError
from ..io.pack import EXACT, SHARED, SIGN
from ..planning.outputs import OutputTensor
from ..planning.roles import MATRIX, role_of

FORMS = ("ffg", "compeft", "tswitch", "bitdelta", "emr")


@dataclass(frozen=True)
class Asked:
    """How an expert is packed. form: one of FORMS; density, saliency_mass: of the edits that are kept;
    density_scope: over the model, or each tensor; values: EXACT or SIGN, of ffg; alpha: ComPEFT's factor;
    moments: second moments, None to keep by magnitude; missing_curvature: as in a recipe.

    Raises RecipeError for what does not go together.
    """

    form: str = "ffg"
    density: float | None = None
    saliency_mass: float | None = None
    density_scope: str = "model"
    values: str = EXACT
    alpha: float = 1.0
    moments: str | None = None
    missing_curvature: str = "error"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise RecipeError(f"unknown form {self.form!r}: choose {', '.join(FORMS)}")
        given = {key: value for key, value in asdict(self).items() if value != _DEFAULTS.get(key, value)}
        for key in given:
            if key not in TAKES[self.form]:
                raise RecipeError(
                    f"--{key.replace('_', '-')} is not used by the form {self.form}: leave it out"
                )
        if self.form == "ffg" and (self.density is None) == (self.saliency_mass is None):
            raise RecipeError("the form ffg takes one of --density and --saliency-mass")
        if self.form == "compeft" and self.density is None:
            raise RecipeError("the form compeft takes --density, the share of edits that is kept: 0.05, say")
        if self.values not in (EXACT, SIGN):
            raise RecipeError(f"unknown values {self.values!r}: choose {EXACT} or {SIGN}")
        if self.form == "tswitch" and not 0 < self.share <= 1:
            raise RecipeError(f"--density must be above 0 and at most 1, not {self.density}")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise RecipeError(f"--alpha must be a positive number, not {self.alpha}")

    @property
    def share(self) -> float:
        """Of the edits of a sign, T-Switch's 1 - q."""
        return 0.4 if self.density is None else self.density

    def recipe(self, experts: Sequence[str], base: str) -> dict[str, Any]:
        """The merge whose inputs are read, and whose masks are taken where it has them."""
        models: list[dict[str, Any]] = [{"model": expert, "parameters": {}} for expert in experts]
        method, shared = "task_arithmetic", {"weight": 1.0}
        if self.form == "compeft":
            method, shared = "localize_stitch", {"density": self.density, "embeddings": "merge"}
        if self.form == "ffg":
            method, shared = "ffg", {"density_scope": self.density_scope}
            shared["missing_curvature"] = self.missing_curvature if self.moments else "uniform"
            keys = {"density": self.density, "saliency_mass": self.saliency_mass}
            models[0]["parameters"] = {key: value for key, value in keys.items() if value is not None}
            if self.moments is not None:
                models[0]["parameters"]["preconditioner_path"] = self.moments
        return {"merge_method": method, "base_model": base, "models": models, "parameters": shared}

    def stored(self, entry: OutputTensor) -> str:
        """What is stored of a tensor's edits."""
        if not entry.is_computed:
            return EXACT
        if self.form == "bitdelta":
            return SIGN if role_of(entry.name, entry.shape) == MATRIX else EXACT
        return {"ffg": self.values, "emr": SHARED}.get(self.form, SIGN)


_DEFAULTS = {field: getattr(Asked, field) for field in Asked.__dataclass_fields__}
TAKES = {
    "ffg": ("density", "saliency_mass", "density_scope", "values", "moments", "missing_curvature"),
    "compeft": ("form", "density", "alpha"),
    "tswitch": ("form", "density"),
    "bitdelta": ("form",),
    "emr": ("form",),
}
