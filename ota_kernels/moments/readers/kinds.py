"""Whose state is it? A state is accepted by all its keys and all settings of its group, or refused by name.

    keys of the state --> the row of KINDS that knows them all --> settings of the group --> shape of exp_avg

Many optimizers keep an `exp_avg_sq` that is not Adam's mean of squared gradients: of gradients in a rotated
basis (SOAP) or a projected one (GaLore), of gradient differences (Adan, MARS), with a step size inside
(Prodigy), one number for a row (NovoGrad, Adam-mini). So what is not known is not read, unless the user says
that it is Adam's (`as_adam`), and even then not what is known to be another's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

from ...errors import InputError
from ...io.header import quoted
from ..source import FactoredMoment, Moment
from . import adafactor, adam, eight_bit
from .signs import looks_like
from .state import State, as_number
from .values import Values


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A state with none of these has no second moments, whoever wrote it.
MOMENT_KEYS = frozenset(
    {"exp_avg_sq", "state2", "exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var", "variance"}
)
# What must have the shape of the second moments where it is a tensor beside them.
_ALIKE = ("exp_avg", "state1", "z", "max_exp_avg_sq", "exp_avg_slow")

# Of torch, apex, DeepSpeed, bitsandbytes, timm, TransformerEngine, Megatron; of schedulers and trainers.
_SETTINGS = _words(
    "params param_names lr initial_lr max_lr min_lr betas eps weight_decay amsgrad maximize foreach "
    "capturable differentiable fused decoupled_weight_decay bias_correction correct_bias step adam_w_mode "
    "momentum_decay caution cautious corrected_weight_decay decoupled trust_clip always_adapt grad_averaging "
    "max_grad_norm use_nvlamb max_coeff min_coeff alpha t_alpha t_beta3 optim_bits percentile_clipping "
    "block_wise min_8bit_size max_unorm skip_zeros is_paged bf16_stochastic_round momentum_dtype "
    "variance_dtype use_kahan_summation compensation_buffer_dtype use_muon is_expert_parallel "
    "is_decoupled_lr max_momentum base_momentum swa_lr default_config torch_autocast_dtype"
)
_SCHEDULE_FREE = _words(
    "r k warmup_steps train_mode weight_sum lr_max weight_lr_power scheduled_lr silent_sgd_phase"
)
_PRODIGY = _words(
    "beta3 use_bias_correction d d0 d_max d_numerator d_coef d_denom d_hat k growth_rate safeguard_warmup "
    "decouple slice_p fsdp_in_use"
)
_ADAFACTOR = _words("d beta2_decay clip_threshold decay_rate beta1 scale_parameter relative_step warmup_init")
# What people add to groups to find them again: lr_scale, layer_id, group_name, wd_mult.
_LABEL = re.compile(r"(^|_)(lr|wd|decay|names?|layer|group|id|mult|label|depth|idx|index)(_|$)")


@dataclass(frozen=True)
class Kind:
    """One optimizer's state.

    name: what it is called; layout: how its values are read; needs, allows: keys of the state; settings: of
    its groups, besides those that all share; betas: how many, None where they are not about v; corrected:
    whether v is divided by 1 - beta2^step; step: the group's name for the number of steps.
    """

    name: str
    layout: ModuleType
    needs: frozenset[str]
    allows: frozenset[str] = frozenset()
    settings: frozenset[str] = frozenset()
    betas: int | None = 2
    corrected: bool = True
    step: str = "step"


def _kind(name: str, layout: ModuleType, needs: str, allows: str = "", **more) -> Kind:
    return Kind(name, layout, _words(needs), _words(f"step {allows}"), **more)


# The first row that knows all keys is it.
KINDS = (
    _kind(
        "Adam",
        adam,
        "exp_avg_sq",
        # max_exp_avg_sq: AMSGrad; mu_product: NAdam; master copies of weights; rounding that Kahan sums keep.
        "exp_avg max_exp_avg_sq mu_product master_param param fp32 compensation shift",
    ),
    _kind("ScheduleFree", adam, "exp_avg_sq z", settings=_SCHEDULE_FREE, step="k"),
    _kind(
        "AdEMAMix",
        adam,
        "exp_avg_sq exp_avg_slow",
        "exp_avg exp_avg_fast",
        settings=_words("t_alpha_beta3 alpha_warmup beta3_warmup"),
        betas=3,
    ),
    _kind("Prodigy", adam, "exp_avg_sq s p0", "exp_avg", settings=_PRODIGY, step="k"),
    _kind("8-bit Adam", eight_bit, "state2", "state1 qmap1 qmap2 absmax1 absmax2 unorm_vec gnorm_vec"),
    *(
        _kind("Adafactor", layout, needs, allows, settings=_ADAFACTOR, betas=None, corrected=False)
        for layout, needs, allows in (
            (adam, "exp_avg_sq RMS", "exp_avg"),
            (adafactor, "exp_avg_sq_row exp_avg_sq_col", "exp_avg RMS"),
            (adafactor, "row_var col_var", ""),
            (adafactor, "variance", ""),
        )
    ),
)


@dataclass(frozen=True)
class Accepted:
    """A state whose second moments are understood. factor: what the stored values are multiplied by; note:
    what the user must know of it."""

    kind: Kind
    state: State
    factor: float = 1.0
    note: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's."""
        return self.kind.layout.shape(self.state)

    @property
    def step(self) -> float | None:
        """Steps taken, by the state or its group."""
        found = self.state.number("step")
        return self.state.number(self.kind.step) if found is None else found

    @property
    def beta2(self) -> float | None:
        """None where v needs no correction, or the group does not say it."""
        return beta2_of(self.state) if self.kind.corrected else None

    def values(self) -> Values:
        """The elements, to be multiplied by `factor`. Raises InputError for factors of a matrix."""
        found = self.kind.layout.values(self.state)
        if found is None:
            raise InputError(f"{self.state.where}: has factors of a matrix where it must be flat")
        return found

    def moment(self, name: str, step: float | None = None) -> Moment | FactoredMoment:
        """As the parameter `name`; step: where the state does not say it."""
        step = self.step if self.step is not None else step
        found = self.kind.layout.values(self.state)
        if found is None:
            return adafactor.factored(self.state, name, step, self.beta2)
        return Moment(name, self.shape, found.pieces(self.factor), step, self.beta2)


def accept(state: State, *, as_adam: bool = False) -> Accepted | None:
    """What `state` is; None where it keeps no second moments.

    as_adam: take keys and settings that are unknown for Adam's. Raises InputError for a state that is another
    optimizer's, or that nothing here knows.
    """
    keys = frozenset(state.keys)
    if keys.isdisjoint(MOMENT_KEYS):
        return None
    kind = next((row for row in KINDS if row.needs <= keys <= row.needs | row.allows), None)
    own = (frozenset(), frozenset()) if kind is None else (kind.needs | kind.allows, kind.settings)
    foreign = looks_like(keys - own[0], frozenset(map(str, state.group)) - own[1])
    if foreign:
        raise _foreign(state, f"is of {foreign}")
    if kind is None and as_adam:
        kind = next((row for row in KINDS if row.needs <= keys), None)
    if kind is None:
        raise _unknown(state, "keys", sorted(keys))
    _check_settings(kind, state, as_adam)
    _check_shapes(state)
    return _prodigy(kind, state) if kind.name == "Prodigy" else Accepted(kind, state)


def absence(state: State | None) -> str:
    """Why a state without second moments has none."""
    if state is None or not set(state.keys) - {"step"}:
        return "never stepped"
    return f"only {', '.join(state.keys)}"


def nothing(reasons: Iterable[str], where: str) -> InputError:
    """The error for a checkpoint without second moments, with the reasons of all its parameters."""
    kept = sorted(
        {key for why in reasons if why.startswith("only ") for key in why[5:].split(", ")} - {"step"}
    )
    if not kept:
        return InputError(
            f"{where}: its optimizer has taken no step: it holds no second moments; "
            "extract from a later checkpoint"
        )
    name = looks_like(frozenset(kept), ())
    by = f" (it looks like {name})" if name else ""
    return InputError(
        f"{where}: holds no second moments, only {quoted(kept)}{by}: without Adam's, "
        "`ota-merge moments estimate` makes curvature from the model and texts"
    )


def beta2_of(state: State) -> float | None:
    """beta2 of the state's group, or None. Raises InputError if it is not a number."""
    betas = state.group.get("betas")
    if not isinstance(betas, (list, tuple)) or len(betas) < 2:
        return None
    return as_number(betas[1], f"{state.where}: beta2")


def _check_settings(kind: Kind, state: State, as_adam: bool) -> None:
    betas = state.group.get("betas")
    if kind.betas is not None and isinstance(betas, (list, tuple)) and len(betas) != kind.betas:
        raise _foreign(state, f"has {len(betas)} betas where {kind.name} has {kind.betas} (Adan has three)")
    known = _SETTINGS | kind.settings
    unknown = sorted(
        str(key) for key in state.group if key not in known and not _LABEL.search(str(key).lower())
    )
    if unknown and not as_adam:
        raise _unknown(state, "settings", unknown)


def _check_shapes(state: State) -> None:
    """Raise InputError where second moments are not one for each element."""
    for key in ("exp_avg_sq", "state2"):
        shape = state.find_shape(key)
        for other in _ALIKE:
            beside = state.find_shape(other)
            if shape is not None and beside is not None and beside != shape:
                raise _foreign(
                    state,
                    f"has {key} of shape {list(shape)} and {other} of shape {list(beside)}: not one number "
                    "for each element (NovoGrad and Adam-mini keep one for a tensor or a row)",
                )


def _prodigy(kind: Kind, state: State) -> Accepted:
    """Prodigy's v is a mean of (d g)^2, d being its estimate of the step size, of which the last is kept."""
    d, first = state.number("d"), state.number("d0")
    if not d or d < 0:
        raise _foreign(state, "is of Prodigy, whose group does not say d")
    note = f"Prodigy's mean of (d g)^2 was divided by d^2, with d = {d:g}"
    if d != first:
        note += ": exact if d stood still over the last steps; else let the recipe say `normalise: model`"
    return Accepted(kind, state, 1.0 / (d * d), note)


def _foreign(state: State, fact: str) -> InputError:
    return InputError(
        f"{state.where}: {fact}: its numbers are not Adam's second moments, and are not used as such; "
        "`ota-merge moments estimate` makes curvature from the model and texts"
    )


def _unknown(state: State, what: str, names: list[str]) -> InputError:
    return InputError(
        f"{state.where}: {what} {', '.join(map(quoted, names[:12]))} are of no optimizer that is known here: "
        "if exp_avg_sq is the mean of squared gradients, as Adam's, `ota-merge moments extract --as-adam` "
        "takes it"
    )
