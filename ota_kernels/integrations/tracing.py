"""Calls of the functional API that torch.compile or torch.export traces become operators (ops.py)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def traceable(function: Function) -> Function:
    """The function itself, but for calls that are traced: those go to its namesake in ops.py."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        torch = sys.modules.get("torch")  # who traces has imported it; others need not
        if torch is not None and torch.compiler.is_compiling():
            from . import torch_ops as ops

            return getattr(ops, function.__name__)(*args, **kwargs)
        return function(*args, **kwargs)

    return call
