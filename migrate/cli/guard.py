"""A second process that finishes or undoes what a verb began, should the verb be killed.

It is forked before anything is touched, so it shares the sockets, and listens on a channel. When that closes without
the word that nothing is left to do, the guard runs ``finish`` and ends. What a listener's queue holds the guard
accepts: it cannot be put back, and so it outlives the verb. The guard has a session of its own, ignores the terminal's
signals and keeps no stream of its parent open.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator

from migrate.errors import from_oserror

__all__ = ["Guard"]

_ACCEPT, _COMMITTED, _DONE = b"a", b"c", b"d"
_DESCRIPTOR_LIMIT = 1 << 30


Finish = Callable[[bool, list[socket.socket]], None]
Accept = Callable[[], Iterator[socket.socket]]


class Guard:
    """The parent's end of the channel.

    ``finish`` runs in the guard and is told whether `commit` was called, and what was accepted. ``keep`` are the
    descriptors that it needs; the guard closes all others. ``accept`` runs in the guard, for `accepted`.
    """

    def __init__(self, finish: Finish, *, keep: Iterable[int] = (), accept: Accept = lambda: iter(())) -> None:
        try:
            self._channel, listens = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise from_oserror("starting the guard process", error) from None
        try:
            self.pid = os.fork()
        except OSError as error:
            listens.close()
            self._channel.close()
            raise from_oserror("starting the guard process", error) from None
        if self.pid == 0:
            try:
                wanted = sorted({0, 1, 2, listens.fileno(), *keep})
                for low, high in itertools.pairwise([*wanted, _DESCRIPTOR_LIMIT]):
                    os.closerange(low + 1, high)
                said, taken = _listen(listens, accept)
                if not said.endswith(_DONE):
                    finish(said.endswith(_COMMITTED), taken)
            finally:
                os._exit(0)
        listens.close()

    def accepted(self) -> Iterator[socket.socket]:
        """What the guard accepts, shared with it. Raises KernelError."""
        try:
            self._channel.send(_ACCEPT)
            while True:
                said, descriptors, _, _ = socket.recv_fds(self._channel, 64, 1)
                if not descriptors:
                    break
                yield socket.socket(fileno=descriptors[0])
            if number := int(said or errno.EPIPE):
                raise OSError(number, os.strerror(number))
        except OSError as error:
            raise from_oserror("emptying a listener's queue", error) from None

    def commit(self) -> None:
        """Tell the guard that the point of no return is passed."""
        self._channel.send(_COMMITTED)

    def leave(self) -> None:
        """This process is through with it: the guard does by itself what is left."""
        self._channel.close()

    def dismiss(self) -> None:
        """Nothing is left to do: the guard ends."""
        self._channel.send(_DONE)
        self._channel.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _listen(channel: socket.socket, accept: Accept) -> tuple[bytes, list[socket.socket]]:
    """Until the other end closes; what was said, and what was accepted."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    said, taken = b"", list[socket.socket]()
    while word := channel.recv(64):
        said += word
        if word == _ACCEPT:
            with contextlib.suppress(BrokenPipeError):  # the other end died; the rest stays in the queue
                channel.send(_hand_over(channel, accept(), taken))
    return said, taken


def _hand_over(channel: socket.socket, accepted: Iterator[socket.socket], taken: list[socket.socket]) -> bytes:
    """The errno that ended it, in digits."""
    try:
        for sock in accepted:
            taken.append(sock)
            socket.send_fds(channel, [b"0"], [sock.fileno()])
    except BrokenPipeError:
        raise
    except OSError as error:
        return b"%d" % (error.errno or 0)
    return b"0"
