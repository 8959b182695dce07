"""A tensor on its way to the host: nobody waits for it before it is looked at."""

from __future__ import annotations

import torch


class LateCopy:
    """A copy on the host of what a tensor holds once the current stream is there.

    Attributes:
        late: whether it is of a CUDA device, and so under way; others are there at once.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        """
        Args:
            tensor: of any device and shape; one on the CPU is not copied.
        """
        self.late = tensor.is_cuda
        self._host = tensor
        self._event: torch.cuda.Event | None = None
        if self.late:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def shape(self) -> torch.Size:
        """Of the tensor; waits for nothing."""
        return self._host.shape

    def get(self) -> torch.Tensor:
        """The tensor on the host; the first look waits for it."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host
