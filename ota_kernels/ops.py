"""Registers torch.ops.ota_kernels: what a program that was exported imports before it is loaded."""

from .integrations.torch_ops import graft, merge_state_dicts, topk_threshold

__all__ = ["graft", "merge_state_dicts", "topk_threshold"]
