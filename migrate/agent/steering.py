"""Steering on the agent's side: the words of --steer, and a thread of its own, beside the handoff.

``vip:DEV`` moves an address as a whole. Whether this can be done for a batch is the mover's question: an address from
which connections stay behind stays with them, and the others are forwarded (``forward``). ``follow`` says that the
address moves by other means: until its connections have followed, its new host forwards them to the old one.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from migrate.agent.logging import get_logger
from migrate.errors import Error, HostError, NotFound, UsageError
from migrate.fourtuple import FourTuple
from migrate.steer.forward import Forward, forwarding
from migrate.steer.vip import Vip

__all__ = ["FOREIGN", "Steerer", "address_of", "check_words", "foreign"]

RETRY = 0.2  # seconds between two attempts
ATTEMPTS = 50

FOREIGN = "it cannot be forwarded between agents that call each other by addresses of the other IP version"
"""Why a connection stays that is `foreign`."""

_log = get_logger(__name__)


def check_words(words: str) -> None:
    """Raise UsageError for what is no way to steer, NotFound for a device that is not here."""
    way, _, rest = words.partition(":")
    if not (words in ("", "forward", "follow") or (way == "vip" and rest)):
        raise UsageError(f"{words!r} is no way to steer", hint="write vip:DEV, as in vip:eth0, or forward, or follow")
    if rest and rest not in (name for _, name in socket.if_nameindex()):
        raise NotFound(f"this host has no device {rest}", hint="`ip -br link` shows those it has")


class Steerer:
    """Carries steering out, in order, in one thread. ``done`` is called when a wish was carried out or given up."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="steering")
        self._vips: dict[str, Vip] = {}
        self._forward: Forward | None = None

    def close(self) -> None:
        """Finish what was begun; how the network is steered stays as it is."""
        self._thread.submit(self._close).result()
        self._thread.shutdown()

    def _close(self) -> None:
        with contextlib.ExitStack() as opened:
            for vip in self._vips.values():
                opened.callback(vip.close)
            if self._forward is not None:
                opened.callback(self._forward.close)

    def warm(self, words: str) -> None:
        """Open what this way needs, which takes a fifth of a second, before it is needed."""
        self._thread.submit(self._prepare, words)

    def take(
        self,
        words: str,
        mine: Sequence[FourTuple],
        others: Sequence[FourTuple],
        owner: bytes,
        done: Callable[[], None],
    ) -> None:
        """``mine`` live here now; ``others`` of the same batch stayed with ``owner``. ``done`` is called in the end."""

        def work() -> None:
            if words.startswith("vip:"):
                if others:
                    self._forwarding().give(others, owner)
                self._vip(words).take(mine)
            self._forwarding().take(mine)

        self._do("taking", words, work, done)

    def give(self, words: str, gone: Sequence[FourTuple], owner: bytes, done: Callable[[], None]) -> None:
        """``gone`` live with ``owner`` now. ``done`` is called in the end."""

        def work() -> None:
            if words.startswith("vip:"):
                self._vip(words).give(gone, owner)
                forward = self._forwarding()
                addresses = {each.local for each in gone}
                forward.take([each for each in forward.given() if each.local in addresses])
            else:
                self._forwarding().give(gone, owner)

        self._do("giving", words, work, done)

    def sweep(self) -> None:
        """Forward no longer what has ended elsewhere. To be called now and then."""
        self._thread.submit(self._sweep)

    def _sweep(self) -> None:
        try:
            if self._forward is not None or forwarding():
                for each in self._forwarding().sweep():
                    _log.info("forwarded no longer: it has ended", connection=each)
        except Error as error:
            _log.warning("what is forwarded could not be swept", why=str(error))

    def _do(self, what: str, words: str, work: Callable[[], None], done: Callable[[], None]) -> None:
        def until_done() -> None:
            try:
                for _ in range(ATTEMPTS):
                    try:
                        return work()
                    except Error as error:
                        _log.warning("steering failed", what=what, steer=words, why=str(error))
                        time.sleep(RETRY)
            except Exception:
                _log.exception("steering failed", what=what, steer=words)
            finally:
                done()

        self._thread.submit(until_done)

    def _prepare(self, words: str) -> None:
        with contextlib.suppress(Error):
            self._forwarding()
            if words.startswith("vip:"):
                self._vip(words)

    def _vip(self, words: str) -> Vip:
        device = words.partition(":")[2]
        if device not in self._vips:
            self._vips[device] = Vip(device)
        return self._vips[device]

    def _forwarding(self) -> Forward:
        if self._forward is None:
            self._forward = Forward()
        return self._forward


def foreign(tuples: Iterable[FourTuple], agent: str) -> list[FourTuple]:
    """Those that nobody can forward to that agent, since its address is of the other IP version. Raises HostError."""
    address = address_of(agent)
    return [each for each in tuples if len(each.local) != len(address)]


def address_of(agent: str) -> bytes:
    """The packed address behind "HOST:PORT". Raises HostError for a unix socket, or a name that is none."""
    host = agent.rpartition(":")[0].strip("[]")
    if agent.startswith("unix:") or not host:
        raise HostError(f"agent {agent} has no address that connections could be forwarded to")
    try:
        family, _, _, _, name = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise HostError(f"agent {agent}: {error.strerror or error}") from None
    return socket.inet_pton(family, str(name[0]).partition("%")[0])
