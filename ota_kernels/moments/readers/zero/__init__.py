"""DeepSpeed checkpoints: ZeRO's flat partitions (`partitions.py`) and universal ones (`universal.py`)."""

from .partitions import read_zero, recognise_zero
from .universal import read_universal, recognise_universal

__all__ = ["read_universal", "read_zero", "recognise_universal", "recognise_zero"]
