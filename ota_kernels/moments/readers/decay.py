"""Which parameters the Hugging Face Trainer gives weight decay: the first of its optimizer's two groups.

transformers  < 4.49       not in a norm layer of a known class, and no "bias" in the name
              4.49 - 4.52  nor "layernorm" or "rmsnorm" in any case
              >= 4.53      not in nn.LayerNorm, no such part, nor "norm" as, or ending, a module's name
Before 4.53 each architecture registered its norm class, or forgot to; so both are rules.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_OLD = re.compile("bias")
_MIDDLE = re.compile("bias|layernorm|rmsnorm")
_NEW = re.compile(r"bias|layernorm|rmsnorm|(^|\.|_)norm($|\.)")
_REGISTERED = ("RMSNorm", "LayerNorm")


def decay_rules(model: nn.Module) -> list[frozenset[str]]:
    """The names with weight decay, by each rule that some version of the Trainer had."""
    from torch import nn

    plain, registered = set(), set()
    for prefix, module in model.named_modules():
        inside = {f"{prefix}.{name}" for name, _ in module.named_parameters()}
        if isinstance(module, nn.LayerNorm):
            plain |= inside
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(_REGISTERED):
            registered |= inside
    names = [name for name, _ in model.named_parameters()]
    return [
        frozenset(name for name in names if name not in norms and not pattern.search(name.lower()))
        for pattern, norms in (
            (_OLD, plain),
            (_OLD, registered),
            (_MIDDLE, plain),
            (_MIDDLE, registered),
            (_NEW, plain),
        )
    ]
