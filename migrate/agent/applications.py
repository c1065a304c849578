"""Applications that take part, at their unix sockets: asked for what leaves, offered what arrives.

An application takes its time, so whatever waits for it runs in a thread of its own; the engine's thread only says last
words, which are sent at once or never. A session lasts as long as its batch: what was given or
taken and is undecided when the agent dies, the application decides by a look at the socket (docs/app-protocol.md).
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from migrate.adopt.sockets import listener_at
from migrate.adopt.unix import AppAdoption, Application, UnixAdopter
from migrate.agent.adoption import Adopters
from migrate.agent.engine import Engine
from migrate.errors import Error
from migrate.fourtuple import FourTuple
from migrate.selection import Found

__all__ = ["Lender", "Loan", "by_application", "lenders", "loan_of", "offer"]


class Lender(NamedTuple):
    """The application that has a connection, and its own number of the descriptor."""

    path: str
    descriptor: int


def lenders(adopters: Adopters, found: Iterable[Found]) -> tuple[dict[FourTuple, Lender], dict[FourTuple, Error]]:
    """Of these connections those that an application lends; and those that stay, because it cannot be found out.

    A connection whose owner is not the process that listens is an unmodified program's, and in neither.
    """
    lent: dict[FourTuple, Lender] = {}
    refused: dict[FourTuple, Error] = {}
    listeners: dict[str, int | Error | None] = {}
    for each in found:
        four_tuple = each.connection.four_tuple
        path = adopters.application(four_tuple)
        if path is None:
            continue
        if path not in listeners:
            try:
                listeners[path] = listener_at(path, adopters.users)
            except Error as error:
                listeners[path] = error
        listener = listeners[path]
        if isinstance(listener, Error):
            refused[four_tuple] = listener
        elif mine := [owner.fd for owner in each.owners if owner.pid == listener]:
            lent[four_tuple] = Lender(path, mine[0])
    return lent, refused


def by_application(found: Iterable[Found], lent: Mapping[FourTuple, Lender]) -> list[list[Found]]:
    """Groups, each of one application's connections, or of those that no application lends."""
    groups: dict[str, list[Found]] = {}
    for each in found:
        lender = lent.get(each.connection.four_tuple)
        groups.setdefault(lender.path if lender else "", []).append(each)
    return list(groups.values())


def loan_of(adopters: Adopters, connections: Iterable[FourTuple], lent: Mapping[FourTuple, Lender]) -> Loan | None:
    """What the application of connections that are one group is asked for; None if they are nobody's."""
    mine = {each: lent[each] for each in connections if each in lent}
    for path, _ in mine.values():
        return Loan(path, adopters, {each: descriptor for each, (_, descriptor) in mine.items()})
    return None


class Loan:
    """Connections of one batch that one application is asked for, and what it is told in the end.

    ``states`` is what it gave, once it has been ``asked``; of the others ``refused`` says why they stay.
    """

    def __init__(self, path: str, adopters: Adopters, descriptors: Mapping[FourTuple, int]) -> None:
        """Without ``descriptors``: what an earlier agent had asked for."""
        self.asked = False
        self.states: dict[FourTuple, bytes] = {}
        self.refused: dict[FourTuple, str] = {}
        self._path = path
        self._users = adopters.users
        self._descriptors = descriptors
        self._session: Application | None = None

    def ask(self) -> None:
        """Ask, and wait for the answers. Never raises Error."""
        answers: Mapping[FourTuple, bytes | Error]
        try:
            self._session = Application(self._path, users=self._users)
        except Error as error:
            answers = dict.fromkeys(self._descriptors, error)
        else:
            answers = self._session.ask(self._descriptors)
        for four_tuple, answer in answers.items():
            if isinstance(answer, bytes):
                self.states[four_tuple] = answer
            else:
                self.refused[four_tuple] = answer.what
        self.asked = True

    def gone(self, connections: Iterable[FourTuple]) -> None:
        """These were let go of. The application sees that its sockets are closed, too."""
        if self._session is not None:
            self._session.gone(connections)

    def keep(self, connections: Iterable[FourTuple]) -> None:
        """These stay, and are thawed. No event tells that, so one that an earlier agent had asked is called."""
        if self._session is not None:
            self._session.keep(connections)
        elif not self._descriptors:
            with contextlib.suppress(Error):
                listener_at(self._path, self._users)

    def close(self) -> None:
        """End the session."""
        if self._session is not None:
            self._session.close()


def offer(
    engine: Engine,
    adopters: Adopters,
    sockets: Mapping[FourTuple, socket.socket],
    answered: Callable[[Mapping[FourTuple, AppAdoption], Mapping[FourTuple, str]], None],
) -> None:
    """Offer silent sockets to their applications. Returns at once; later ``answered`` is called in the engine's thread.

    It is given the adoptions, and why others were not taken.
    """

    def work() -> None:
        taken, refused = _offer(adopters, sockets)
        engine.call(partial(answered, taken, refused))

    adopters.offering.submit(work)


def _offer(
    adopters: Adopters, sockets: Mapping[FourTuple, socket.socket]
) -> tuple[dict[FourTuple, AppAdoption], dict[FourTuple, str]]:
    taken: dict[FourTuple, AppAdoption] = {}
    refused: dict[FourTuple, str] = {}
    groups: dict[str, list[FourTuple]] = {}
    for four_tuple in sockets:
        if (path := adopters.application(four_tuple)) is not None:
            groups.setdefault(path, []).append(four_tuple)
    for path, group in groups.items():
        adoptions: Sequence[AppAdoption]
        try:
            adoptions = UnixAdopter(path, users=adopters.users).adopt([sockets[each] for each in group])
        except Error as error:
            refused |= dict.fromkeys(group, error.what)
            continue
        for four_tuple, adoption in zip(group, adoptions, strict=True):
            if adoption.refusal is None:
                taken[four_tuple] = adoption
            else:
                refused[four_tuple] = adoption.refusal.what
    return taken, refused
