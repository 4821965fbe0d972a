"""Page-locked host memory: a device copies from and to it by itself, while the host goes on.

It is not torch's (`pin_memory=True`): that rounds sizes up to powers of two, keeps what is given up, and,
given up after its device has failed, ends the process, because its destructor throws.
"""

from __future__ import annotations

import contextlib
import logging
import mmap

import numpy as np
import torch

logger = logging.getLogger(__name__)


class Pinned:
    """uint8[nbytes] as `array` (numpy) and as `tensor` (torch), for one device; nbytes: above 0.

    Memory that cannot be locked is used as it is: copies are right, but the host waits for them.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # whole pages
        self.array = np.frombuffer(memory, np.uint8)
        self.tensor = torch.from_numpy(self.array)
        self._device = device
        self._locked = device.type == "cuda" and _lock(self.tensor, device)

    def close(self) -> None:
        """Unlock it. No copy may be under way."""
        if self._locked:
            with torch.cuda.device(self._device):
                torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())
            self._locked = False


def _lock(tensor: torch.Tensor, device: torch.device) -> bool:
    code = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0))
    if code == 0:
        return True
    logger.warning("%s: memory cannot be page-locked (CUDA error %d): copies take longer", device, code)
    with contextlib.suppress(RuntimeError):
        torch.zeros(
            1, device=device
        )  # or torch's next kernel of this thread would report the error once more
    return False
