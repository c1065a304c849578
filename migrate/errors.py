"""The errors of tcpmig, one tree; the type says whose fault it is.

::

    Error                        exit  what went wrong
    ├── UsageError                2    the caller's words: a selector, an option, a value
    ├── RecordError               1    bytes that are no ICI record: carries offset and field
    │   ├── RecordTruncated       1    … they end too early
    │   └── RecordVersionError    1    … a major version this reader does not know
    ├── NotFound                  1    no such connection, process, descriptor, namespace
    ├── Refused                   1    this connection cannot be moved, and was not touched
    │   └── Gone                  1    it closed while it was being dumped
    ├── Conflict                  1    the destination already has it, or has seen a newer epoch
    ├── HostError                 4    this host cannot; the hint says what would change that
    │   └── PrivilegeError        4    … because a capability is missing
    ├── KernelError               1    a system call failed: carries operation and errno
    └── RemoteError               1    the other agent answered with a failure, or not at all

Every error reads as one sentence, ``what``, and may carry a ``hint``: what the reader can do about it.
"""

from __future__ import annotations

import errno as _errno
import os

__all__ = [
    "Conflict",
    "Error",
    "Gone",
    "HostError",
    "KernelError",
    "NotFound",
    "PrivilegeError",
    "RecordError",
    "RecordTruncated",
    "RecordVersionError",
    "Refused",
    "RemoteError",
    "UsageError",
    "from_oserror",
]


class Error(Exception):
    """Root of the tree.

    ``what`` is one sentence without a full stop; ``hint`` says what would help, or is None.
    """

    exit_code = 1

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what} ({self.hint})" if self.hint else self.what


class UsageError(Error):
    """The caller's words make no sense."""

    exit_code = 2


class RecordError(Error):
    """Bytes that are no ICI record. ``offset`` counts bytes from the start of the stream; ``field`` is a path."""

    def __init__(self, what: str, *, offset: int, field: str | None = None, hint: str | None = None) -> None:
        where = f"at byte {offset}" if field is None else f"at byte {offset}, field {field}"
        super().__init__(f"{what}, {where}", hint=hint)
        self.offset = offset
        self.field = field


class RecordTruncated(RecordError):
    """The bytes end before the record does."""


class RecordVersionError(RecordError):
    """A major version that this reader does not know."""


class NotFound(Error):
    """No such connection, process, descriptor, file or namespace."""


class Refused(Error):
    """This connection cannot be moved; nothing of it was touched."""


class Gone(Refused):
    """The connection ended while it was being dumped."""


class Conflict(Error):
    """The destination already has this four-tuple, or has seen a newer epoch of this connection."""


class HostError(Error):
    """This host cannot do it; ``hint`` says what would change that."""

    exit_code = 4


class PrivilegeError(HostError):
    """A capability is missing."""


class KernelError(Error):
    """A system call failed: ``operation`` names it, ``errno`` is its number."""

    def __init__(self, operation: str, errno: int, *, hint: str | None = None) -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(f"{operation}: {os.strerror(errno)} [{name}]", hint=hint)
        self.operation = operation
        self.errno = errno


class RemoteError(Error):
    """The other agent answered with a failure, or did not answer."""


def from_oserror(operation: str, error: OSError, *, hint: str | None = None) -> Error:
    """The member of the tree for a failed system call: EPERM becomes PrivilegeError, all else KernelError."""
    if error.errno in (_errno.EPERM, _errno.EACCES):
        return PrivilegeError(
            f"{operation}: not permitted",
            hint=hint or "needs CAP_NET_ADMIN; run as root, or inside `unshare -Urn`",
        )
    return KernelError(operation, error.errno or 0, hint=hint)
