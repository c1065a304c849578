"""A second process that finishes or undoes what a verb began, should the verb be killed.

It is forked before anything is touched, so it shares the sockets, and listens on a pipe. When the pipe closes without
the word that nothing is left to do, the guard runs ``finish`` and ends. The guard has a session of its own, ignores the
terminal's signals and keeps no stream of its parent open.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterable

from migrate.errors import from_oserror

__all__ = ["Guard"]

_COMMITTED, _DONE = b"c", b"d"
_DESCRIPTOR_LIMIT = 1 << 30


class Guard:
    """The parent's end of the pipe. ``finish`` runs in the guard and is told whether `commit` was called.

    ``keep`` are the descriptors that it needs; the guard closes all others.
    """

    def __init__(self, finish: Callable[[bool], None], *, keep: Iterable[int] = ()) -> None:
        try:
            listens, self._pipe = os.pipe2(os.O_CLOEXEC)
        except OSError as error:
            raise from_oserror("starting the guard process", error) from None
        try:
            self.pid = os.fork()
        except OSError as error:
            os.close(listens)
            os.close(self._pipe)
            raise from_oserror("starting the guard process", error) from None
        if self.pid == 0:
            try:
                wanted = sorted({0, 1, 2, listens, *keep})
                for low, high in itertools.pairwise([*wanted, _DESCRIPTOR_LIMIT]):
                    os.closerange(low + 1, high)
                said = _listen(listens)
                if not said.endswith(_DONE):
                    finish(said == _COMMITTED)
            finally:
                os._exit(0)
        os.close(listens)

    def commit(self) -> None:
        """Tell the guard that the point of no return is passed."""
        os.write(self._pipe, _COMMITTED)

    def leave(self) -> None:
        """This process is through with it: the guard does by itself what is left."""
        os.close(self._pipe)

    def dismiss(self) -> None:
        """Nothing is left to do: the guard ends."""
        os.write(self._pipe, _DONE)
        os.close(self._pipe)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _listen(pipe: int) -> bytes:
    """Until the other end closes; what was said."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    said = b""
    while word := os.read(pipe, 64):
        said += word
    return said
