"""The backing store of a page tier: bytes in memory or in a file."""

import contextlib
import mmap
import os

import torch


class HostStoreError(RuntimeError):
    """Reading or writing the host store failed; the tier that met it is of no use any more."""


class HostStore:
    """Bytes that hold the record of every page of every layer.

    Attributes:
        kind: "memory" or "file".
        num_bytes: size.
        fd: file descriptor of a file, -1 for memory. It stays its owner's to close, after the tier.
        pointer: address of memory, 0 for a file.
    """

    def __init__(self, kind: str, num_bytes: int, *, fd: int = -1) -> None:
        if num_bytes <= 0:
            raise ValueError(f"page_tier: a host store needs at least a byte, got {num_bytes}")
        self.kind, self.num_bytes, self.fd = kind, num_bytes, fd
        self._bytes = torch.empty(0, dtype=torch.uint8)
        if kind == "memory":
            self._bytes = lazy_bytes(num_bytes)
        self.pointer = self._bytes.data_ptr() if kind == "memory" else 0

    @classmethod
    def memory(cls, num_bytes: int) -> "HostStore":
        """Anonymous memory, taken from the system page by page as it is written.

        Raises:
            ValueError: no positive size.
            OSError: the address space does not have it.
        """
        return cls("memory", num_bytes)

    @classmethod
    def file(cls, fd: int, num_bytes: int) -> "HostStore":
        """The first ``num_bytes`` of an open file, read and written by pread and pwrite.

        Raises:
            ValueError: no positive size, or no descriptor.
        """
        if fd < 0:
            raise ValueError(f"page_tier: {fd} is no file descriptor")
        return cls("file", num_bytes, fd=fd)

    def read(self, offset: int, count: int) -> torch.Tensor:
        """Bytes offset .. offset + count, uint8.

        Raises:
            HostStoreError: the file does not give them.
        """
        if self.kind == "memory":
            return self._bytes[offset : offset + count].clone()
        data = bytearray()
        while len(data) < count:
            try:
                part = os.pread(self.fd, count - len(data), offset + len(data))
            except OSError as error:
                raise failure("reading", offset, count, error.errno or 0) from error
            if not part:
                raise failure("reading", offset, count, 0)
            data += part
        return torch.frombuffer(data, dtype=torch.uint8)

    def write(self, offset: int, data: torch.Tensor) -> None:
        """Put uint8 ``data`` at ``offset``.

        Raises:
            HostStoreError: the file does not take them.
        """
        if self.kind == "memory":
            self._bytes[offset : offset + len(data)] = data
            return
        view, done = memoryview(data.contiguous().numpy()), 0
        while done < len(view):
            try:
                part = os.pwrite(self.fd, view[done:], offset + done)
            except OSError as error:
                raise failure("writing", offset, len(view), error.errno or 0) from error
            if not part:
                raise failure("writing", offset, len(view), 0)
            done += part


def lazy_bytes(count: int) -> torch.Tensor:
    """Zeros, uint8, taken from the system as they are written, in huge pages where it has them."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, count, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def failure(verb: str, offset: int, count: int, code: int) -> HostStoreError:
    """The error of a transfer; ``code`` is an errno, 0 where the file ended."""
    reason = os.strerror(code) if code else "the file is shorter than it was made"
    return HostStoreError(
        f"page_tier: {verb} {count} bytes at {offset} of the host store failed: {reason}; "
        "the tier is stopped, restart the server with a host store that works"
    )
