"""The signs by which an optimizer other than Adam shows itself: keys of its state, settings of its group."""

from __future__ import annotations

from collections.abc import Collection

# A key of the state alone says it. Read off the optimizers' own states, with what their moments are of.
_STATE_SIGNS = {
    "Adan": "exp_avg_diff neg_pre_grad pre_grad previous_diff prev_grad",
    "SOAP": "GG Q Q_GG QL QR project precondition_frequency",
    "GaLore": "projector ortho_matrix projection_matrix ortho",
    "MARS": "last_grad",
    "AdaBelief": "exp_avg_var",
    "Adamax": "exp_inf exp_avg_inf",
    "Sophia or AdaHessian": "hessian exp_hessian_diag_sq exp_hessian_diag hessian_moment",
    "Adagrad": "sum",
    "RMSprop": "square_avg",
    "Adam-mini": "vmean v_mean head_numel",
    "Muon or SGD": "momentum_buffer",
    "Shampoo": "preconditioner preconditioners preconds factor_matrices inv_preconds",
    "1-bit Adam": "worker_error server_error",
    "SPAM": "mask",
    "StableAdamW": "kahan_comp",
    "StableSPAM": "m_norm_t v_norm_t m_max_t",
    "Adai": "beta1_prod",
    "AdaMod or LaProp": "exp_avg_lr exp_avg_lr_1",
    "Ranger": "slow_buffer",
    "CAME": "exp_avg_res_row exp_avg_res_col",
    "QHAdam": "beta1_weight",
    "AdaShift": "grad_queue",
    "MADGRAD": "grad_sum_sq",
    "GrokFast": "grok_exp_avg",
}
# A setting of the group says it, whatever the state's keys are.
_GROUP_SIGNS = {
    "SOAP": "precondition_frequency max_precond_dim max_precondition_dim shampoo_beta precondition_1d",
    "GaLore": "update_proj_gap proj_type projection_type rank",
    "APOLLO": "scale_type scale_front",
    "D-Adaptation": "d_coef gsq_weighted numerator_weighted growth_rate d0",
    "Yogi": "initial_accumulator",
    "MARS": "mars_type optimize_1d",
    "ADOPT": "clip_lambda clip_exp",
    "AdaHessian": "hessian_power n_samples",
    "StableAdamW": "kahan_sum",
    "Adan": "no_prox",
    "Nero": "constraints",
}


def looks_like(keys: Collection[str], group: Collection[str]) -> str | None:
    """The optimizer that keys of a state, or settings of its group, are a sign of; None where none is."""
    for signs, found in ((_STATE_SIGNS, keys), (_GROUP_SIGNS, group)):
        for name, words in signs.items():
            if any(word in found for word in words.split()):
                return name
    if "m" in keys and "v" in keys:
        return "an optimizer with states m and v"
    return "Lion" if set(keys) == {"exp_avg"} else None
