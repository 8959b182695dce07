"""The side stream of a page tier, and what stands for it where there is no CUDA device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

import torch

from sgl_psa_kernels.page_tier.host_store import HostStore, HostStoreError

#: Of the CUDA driver: CU_POINTER_ATTRIBUTE_DEVICE_POINTER.
_DEVICE_POINTER = 3


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether the device has passed it."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""
        ...


class Streams:
    """The caller's current stream, and one beside it, of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device)

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros that the device can copy to."""
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of a CPU tensor on the device; does not wait."""
        return values.pin_memory().to(self.device, non_blocking=True)

    def aside(self, work: Callable[[], None], *used: torch.Tensor) -> Event:
        """Do ``work`` on the side stream, behind all that the current stream has been told so far;
        returns the event of its end. Tensors ``used`` keep their memory until then."""
        for tensor in used:
            tensor.record_stream(self._side)
        told, done = torch.cuda.Event(), torch.cuda.Event()
        told.record(torch.cuda.current_stream(self.device))
        self._side.wait_event(told)
        with torch.cuda.stream(self._side):
            work()
        done.record(self._side)
        return done

    def wait(self, event: Event) -> None:
        """What the current stream is told from now on comes after ``event``; the host goes on."""
        assert isinstance(event, torch.cuda.Event)
        torch.cuda.current_stream(self.device).wait_event(event)

    def capturing(self) -> bool:
        """Whether the current stream is being captured in a CUDA graph."""
        return torch.cuda.is_current_stream_capturing()

    def pin(self, host: HostStore) -> None:
        """Have kernels address the store's memory by its own addresses; takes all of it.

        Raises:
            HostStoreError: the system does not pin so much, or maps it elsewhere.
        """
        torch.cuda.init()
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            code = torch.cuda.cudart().cudaHostRegister(host.pointer, host.num_bytes, 3)
            if int(code) != 0:
                raise HostStoreError(
                    f"page_tier: pinning {host.num_bytes} bytes for the device failed (CUDA error "
                    f"{int(code)}); choose a smaller host pool"
                )
            seen = ctypes.c_uint64()
            driver = ctypes.CDLL("libcuda.so.1")
            address = ctypes.c_uint64(host.pointer)
            code = driver.cuPointerGetAttribute(ctypes.byref(seen), _DEVICE_POINTER, address)
            if code != 0 or seen.value != host.pointer:
                self.unpin(host)
                raise HostStoreError(
                    "page_tier: this system maps pinned memory at other addresses on the device "
                    f"(CUDA error {code}); serve without tiers here"
                )

    def unpin(self, host: HostStore) -> None:
        """Undo :meth:`pin` once the device is idle."""
        torch.cuda.synchronize(self.device)
        torch.cuda.cudart().cudaHostUnregister(host.pointer)


class _Passed:
    """An event of a stand-in."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Inline:
    """CPU tensors, and everything done at once: for kernels in Triton's interpreter."""

    device = torch.device("cpu")

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    def aside(self, work: Callable[[], None], *used: torch.Tensor) -> Event:
        work()
        return _Passed()

    def wait(self, event: Event) -> None:
        event.synchronize()

    def capturing(self) -> bool:
        return False

    def pin(self, host: HostStore) -> None:
        pass

    def unpin(self, host: HostStore) -> None:
        pass
