"""NFLOG: the packets that a `log group N` rule copies to us (include/uapi/linux/netfilter/nfnetlink_log.h).

Groups belong to a network namespace, and to one socket at a time: while a process listens nobody else can.
"""

from __future__ import annotations

import errno
import random
from typing import Self

from migrate.errors import Conflict, Error, HostError, KernelError, PrivilegeError
from migrate.kernel.nfnetlink import Netfilter, attribute, attributes, message, u16, u32

__all__ = ["Listener"]

NFNL_SUBSYS_ULOG = 4  # include/uapi/linux/netfilter/nfnetlink.h
NFULNL_MSG_PACKET, NFULNL_MSG_CONFIG = 0, 1
NFULA_PAYLOAD, NFULA_SEQ = 9, 12
NFULA_CFG_CMD, NFULA_CFG_MODE, NFULA_CFG_QTHRESH, NFULA_CFG_FLAGS = 1, 2, 5, 6
NFULNL_CFG_CMD_BIND, NFULNL_COPY_PACKET, NFULNL_CFG_F_SEQ = 1, 2, 1

_PACKET = NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_PACKET
_GENERAL = 4  # bytes of struct nfgenmsg
_DATAGRAM = 1 << 17  # bytes: a packet of 64 KiB and what the kernel tells about it
_RECEIVE_BUFFER = 32 << 20  # bytes
_ATTEMPTS = 100  # random groups, until one was free


class Listener:
    """Listens to an NFLOG group of the network namespace that it was made in.

    ``lost`` counts the packets that did not fit into the socket's buffer: their senders will repeat them.
    """

    def __init__(self, group: int | None = None) -> None:
        """Bind that group, or one that is free. Raises Conflict if another socket has it, PrivilegeError, HostError."""
        self._netfilter = Netfilter()
        self._buffer = memoryview(bytearray(_DATAGRAM))
        self._expected = 0  # number of the next packet
        self.lost = 0
        try:
            self._netfilter.enlarge_receive_buffer(_RECEIVE_BUFFER)
            self.group = self._bind_free() if group is None else self._bind(group)
        except Error:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the group; again does nothing."""
        self._netfilter.close()

    def fileno(self) -> int:
        """For poll: readable when packets are there. -1 when closed."""
        return self._netfilter.fileno()

    def read(self) -> list[bytes]:
        """The packets that have come, in their order, from the IP header on; never waits.

        A packet longer than 65,531 bytes is cut there: an attribute holds no more.
        """
        packets = []
        while True:
            try:
                for kind, _, rest in self._netfilter.receive(self._buffer):
                    if kind == _PACKET:
                        packets.append(self._packet(rest))
            except BlockingIOError:
                return packets
            except OSError as error:
                # ENOBUFS says that some were lost; how many the next one's number tells.
                if error.errno != errno.ENOBUFS:
                    raise KernelError("reading NFLOG", error.errno or 0) from None

    def _packet(self, rest: memoryview) -> bytes:
        payload = b""
        for kind, value in attributes(rest[_GENERAL:]):
            if kind == NFULA_SEQ:
                number = int.from_bytes(value)
                self.lost += (number - self._expected) % 2**32
                self._expected = number + 1
            elif kind == NFULA_PAYLOAD:
                payload = bytes(value)
        return payload

    def _bind(self, group: int) -> int:
        settings = (
            attribute(NFULA_CFG_CMD, bytes((NFULNL_CFG_CMD_BIND,))),
            attribute(NFULA_CFG_MODE, b"\0\0\xff\xff" + bytes((NFULNL_COPY_PACKET, 0))),
            u32(NFULA_CFG_QTHRESH, 1),
            u16(NFULA_CFG_FLAGS, NFULNL_CFG_F_SEQ),
        )
        # The group is the resource id of struct nfgenmsg.
        request = message(NFULNL_MSG_CONFIG, 0, *settings, subsystem=NFNL_SUBSYS_ULOG, resource=group)
        operation = f"listening to NFLOG group {group}"
        try:
            self._netfilter.request(operation, request)
        except PrivilegeError:
            # The kernel says EPERM for a group that another socket has, too.
            self._netfilter.require_privilege(operation)
            raise Conflict(f"NFLOG group {group} is in use by another process") from None
        except KernelError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                raise HostError(
                    "this kernel has no NFLOG", hint="modprobe nfnetlink_log, or CONFIG_NETFILTER_NETLINK_LOG"
                ) from None
            raise
        return group

    def _bind_free(self) -> int:
        for _ in range(_ATTEMPTS):
            try:
                return self._bind(random.randint(1, 0xFFFF))
            except Conflict:
                continue
        raise Conflict("no free NFLOG group was found", hint="see /proc/net/netfilter/nfnetlink_log")
