"""A dry run's question to the destinations: would they take these? Nothing is begun there, and nothing here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from migrate.agent.driver import Host
from migrate.agent.reports import Outcomes
from migrate.agent.v1 import types_pb2
from migrate.agent.wire import MAX_CONNECTIONS
from migrate.errors import Error, Refused
from migrate.fourtuple import FourTuple
from migrate.handoff.ids import Connection, new_id
from migrate.handoff.messages import Prepare
from migrate.relocate import LocalMaps

__all__ = ["rehearse"]


async def rehearse(
    host: Host, sockets: Iterable[tuple[FourTuple, int]], destinations: Sequence[str], steer: str, maps: LocalMaps
) -> tuple[dict[str, Outcomes], Error | None]:
    """What each destination says of the connections, given with their cookies, that those before it do not take.

    The error is that of the last one, if it could not be asked.
    """
    left = await host.engine.ask(lambda: host.journal.name(sockets))
    if maps:
        left = tuple(msgspec.structs.replace(each, there=maps.there(each.four_tuple)) for each in left)
    said: dict[str, Outcomes] = {}
    problem: Error | None = None
    for destination in destinations:
        if not left:
            break
        problem = None
        try:
            why = await _asked(host, destination, left, steer)
        except Error as error:
            why, problem = dict.fromkeys((each.id for each in left), error), error
        last = destination == destinations[-1]
        said[destination] = {
            each.four_tuple: (types_pb2.OUTCOME_STAYED, why[each.id])
            if each.id in why
            else (types_pb2.OUTCOME_DONE, None)
            for each in left
            if last or each.id not in why
        }
        left = tuple(each for each in left if each.id in why)
    return said, problem


async def _asked(host: Host, agent: str, connections: Sequence[Connection], steer: str) -> dict[bytes, Error]:
    """Why that agent would refuse some of them, by id. Raises Error if it does not say."""
    refused: dict[bytes, Error] = {}
    for start in range(0, len(connections), MAX_CONNECTIONS):
        part = tuple(each.at_destination() for each in connections[start : start + MAX_CONNECTIONS])
        answer = await host.check(agent, Prepare(batch=new_id(), connections=part, steer=steer))
        refused |= {id: Refused(why) for id, why in answer.refused.items()}
    return refused
