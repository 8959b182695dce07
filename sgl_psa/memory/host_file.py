"""The file of a host tier on disk: room for all of it before the server starts, and no remains.

The file has no name: it is gone with the process that made it, however that ends, so a restart
finds neither a lock nor a stale file, and every rank of a server has one of its own.
"""

from __future__ import annotations

import errno
import os
import tempfile

from sgl_psa.config import ConfigError


class HostFile:
    """An open file of ``num_bytes`` allocated bytes.

    Attributes:
        fd: descriptor, open for reading and writing until ``close``.
        num_bytes: its length.
    """

    def __init__(self, folder: str, num_bytes: int) -> None:
        """
        Args:
            folder: where the file lives; on the disk whose speed is that of the tier.

        Raises:
            ConfigError: no such folder, no right to write there, or not enough room; the message
                says which, and what to set.
        """
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise ConfigError(
                f"host_path={folder!r} is a file: name a folder, in which the host tier makes a "
                "file of its own"
            )
        try:
            self.fd = _open(folder)
        except OSError as error:
            raise ConfigError(
                f"host_path={folder!r}: no file can be made there ({error.strerror}); name a "
                "folder that exists and that this user may write to"
            ) from None
        self.num_bytes = num_bytes
        try:
            os.posix_fallocate(self.fd, 0, num_bytes)
        except OSError as error:
            free = os.fstatvfs(self.fd)
            self.close()
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ConfigError(
                    f"host_path={folder!r} has no room for host_pool_bytes={num_bytes} "
                    f"({error.strerror}; {free.f_bavail * free.f_frsize} bytes free): set "
                    "host_pool_bytes lower, or name another folder"
                ) from None
            raise ConfigError(
                f"host_path={folder!r}: its file system cannot set {num_bytes} bytes aside "
                f"({error.strerror}); name a folder on another"
            ) from None

    def close(self) -> None:
        """Give the file and its room back; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _open(folder: str) -> int:
    """A file without a name in ``folder``."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        # File systems without O_TMPFILE say so in one of these ways.
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    fd, path = tempfile.mkstemp(prefix="psa-host-", dir=folder)
    os.unlink(path)
    return fd
