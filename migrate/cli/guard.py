"""A second process that finishes or undoes what a verb began, whatever happens to the first.

It is forked before anything is touched, so it shares the sockets and the hold, and listens on a pipe. When the pipe
closes, because the verb is done or because it died, the guard runs ``finish`` and ends. The guard has a session of its
own, ignores the terminal's signals and keeps no stream of its parent open.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable

from migrate.errors import from_oserror
from migrate.hold import Hold

__all__ = ["Guard", "linger"]

_WORD = b"c"


class Guard:
    """The parent's end of the pipe. ``finish`` runs in the guard and is told whether `commit` was called."""

    def __init__(self, finish: Callable[[bool], None]) -> None:
        listens, self._pipe = os.pipe2(os.O_CLOEXEC)
        try:
            self.pid = os.fork()
        except OSError as error:
            os.close(listens)
            os.close(self._pipe)
            raise from_oserror("starting the guard process", error) from None
        if self.pid == 0:
            try:
                os.close(self._pipe)
                finish(_listen(listens))
            finally:
                os._exit(0)
        os.close(listens)

    def commit(self) -> None:
        """Tell the guard that the point of no return is passed."""
        os.write(self._pipe, _WORD)

    def dismiss(self, *, wait: bool) -> None:
        """This process is done: the guard does what is left, by itself, or while we wait for its end."""
        os.close(self._pipe)
        if wait:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)


def _listen(pipe: int) -> bool:
    """Until the other end closes; whether the word was said."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    said = b""
    while word := os.read(pipe, 64):
        said += word
    return said.endswith(_WORD)


def linger(hold: Hold, seconds: float) -> None:
    """Keep the hold that long, reading away what it keeps: nobody here will want it."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        select.select([hold], (), (), left)
        hold.discard()
    hold.lift()
