"""Drives the machines of all batches: one thread, events in, commands out, timers. It does not know what commands do.

Everything that touches the kernel, the journal or a machine happens in the engine's thread, in order, so that nothing
needs a lock. Others speak to it by `call`. What takes long is started elsewhere and ends with `resume`.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

from migrate.agent.logging import get_logger
from migrate.errors import Error, HostError, RemoteError
from migrate.handoff import commands as do
from migrate.handoff.events import Event, Failed, Timeout
from migrate.handoff.machine import Machine
from migrate.handoff.messages import Message

__all__ = ["CRASH_AT", "Again", "Batch", "Engine", "Later", "Performer", "Stream"]

CRASH_AT = "TCPMIG_CRASH_AT"
"""The environment variable that says where something goes wrong on purpose, for tests: POINT=FATE, with commas.

A point is a crash point (docs/handoff.md), met once. KILL, or no fate: the agent kills itself there. STOP: it stops
itself (SIGSTOP) until it is continued. FAIL: the command after the point fails.
"""

RETRY = 0.2  # seconds until a command that goes on until done is tried again

T = TypeVar("T")

_log = get_logger(__name__)


class Stream(Protocol):
    """One handoff stream, seen from the engine's thread."""

    peer: str

    def send(self, message: Message) -> None:
        """Queue a message; one that cannot go any more is dropped."""

    def fail(self, error: Error) -> None:
        """End it: the other side broke the protocol."""


class Later:
    """What a performer returns for a command that goes on elsewhere: `Engine.resume` ends it."""


class Again(NamedTuple):
    """What a performer returns for a command that must be carried out again: after a while, or with `Engine.resume`."""

    why: str
    by_itself: bool = True


class _Todo(NamedTuple):
    step: int
    point: str
    command: do.Command | None  # None: only the crash point
    fallible: bool


class Batch:
    """A machine, its queue, and the stream that its latest message came or went on."""

    def __init__(self, machine: Machine, performer: Performer) -> None:
        self.machine = machine
        self.performer = performer
        self.stream: Stream | None = None
        self.queue: deque[_Todo] = deque()
        self.waiting = False  # for a command that goes on elsewhere
        self.pumping = False


class Performer(Protocol):
    """Who carries the commands out, in the engine's thread."""

    def perform(self, batch: Batch, command: do.Command) -> Event | Later | Again | None:
        """One command, to its end. Raises Error."""

    def ended(self, batch: Batch) -> None:
        """The machine is over and its queue carried out."""


class Engine:
    """The thread and its queue. `start` it, `call` it, `stop` it."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], object]] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._readers: dict[int, Callable[[], object]] = {}
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine")
        words = os.environ.get(CRASH_AT, "").split(",")
        self._faults = {point: fate or "KILL" for point, _, fate in (word.partition("=") for word in words)}

    def start(self) -> None:
        """From here calls are carried out."""
        self._thread.start()

    def stop(self) -> None:
        """Carry out what was called so far and end. Called from another thread."""
        self.call(self._stop)
        self._thread.join()
        os.close(self._wake)

    def _stop(self) -> None:
        self._stopping = True

    def call(self, call: Callable[[], object]) -> None:
        """Have ``call`` carried out in the engine's thread, after what was called before. From any thread."""
        self._calls.append(call)
        os.eventfd_write(self._wake, 1)

    async def ask(self, call: Callable[[], T]) -> T:
        """The result of ``call``, carried out in the engine's thread. From an event loop. Raises what it raises."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                result = call()
            except Error as error:
                loop.call_soon_threadsafe(ended.set_exception, error)
            else:
                loop.call_soon_threadsafe(ended.set_result, result)

        self.call(work)
        return await ended

    def later(self, seconds: float, call: Callable[[], object]) -> None:
        """Have ``call`` carried out in so many seconds. From the engine's thread."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), call))

    def watch(self, descriptor: int, call: Callable[[], object]) -> None:
        """Have ``call`` carried out whenever the descriptor is readable. Before `start`, or from its thread."""
        self._readers[descriptor] = call
        self._poll.register(descriptor, select.POLLIN)

    def unwatch(self, descriptor: int) -> None:
        """Watch it no longer. From the engine's thread."""
        self._poll.unregister(descriptor)
        del self._readers[descriptor]

    def give(self, batch: Batch, event: Event) -> None:
        """An event for the batch's machine. From the engine's thread. Raises UsageError for a wish it cannot have."""
        if batch.machine.over:
            return
        try:
            step = batch.machine.receive(event)
        except RemoteError as error:
            _log.warning("message refused", batch=batch.machine.batch.hex(), why=str(error))
            if batch.stream is not None:
                batch.stream.fail(error)
            return
        except RuntimeError:
            _log.exception("event refused", batch=batch.machine.batch.hex())
            return
        if not step.point:
            return
        _log.debug("step", batch=batch.machine.batch.hex(), point=step.point, state=batch.machine.state.name)
        number = next(self._numbers)
        batch.queue.extend(_Todo(number, point, command, step.fallible) for point, command in step.points())
        batch.queue.append(_Todo(number, step.point, None, False))
        self.pump(batch)

    def resume(self, batch: Batch, event: Event | None = None) -> None:
        """The command that went on elsewhere has ended, with this event if any. From the engine's thread."""
        batch.waiting = False
        if event is not None:
            self.give(batch, event)
        self.pump(batch)

    def pump(self, batch: Batch) -> None:
        """Carry out what is queued, until the queue is empty or a command goes on elsewhere."""
        if batch.pumping or batch.waiting:
            return
        batch.pumping = True
        try:
            while batch.queue and not batch.waiting:
                self._carry_out(batch, batch.queue.popleft())
        finally:
            batch.pumping = False
        if batch.machine.over and not batch.queue and not batch.waiting:
            batch.performer.ended(batch)

    def start_timer(self, batch: Batch, seconds: float, serial: int) -> None:
        """Timeout(serial) for the machine; one that was replaced meanwhile is ignored by the machine."""
        self.later(seconds, lambda: self.give(batch, Timeout(serial)))

    def _carry_out(self, batch: Batch, todo: _Todo) -> None:
        fate = self._faults.pop(todo.point, None)
        if fate is not None:
            _log.warning("a fault on purpose", point=todo.point, fate=fate)
        if fate in ("KILL", "STOP"):
            signal.raise_signal(signal.Signals[f"SIG{fate}"])  # to this thread: it does not come out of the call
        if todo.command is None:
            return
        try:
            if fate == "FAIL":
                raise HostError("a fault on purpose")
            outcome = batch.performer.perform(batch, todo.command)
        except Exception as error:
            self._failed(batch, todo, error)
            return
        match outcome:
            case None:
                pass
            case Later():
                batch.waiting = True
            case Again(why=why, by_itself=by_itself):
                batch.waiting = True
                batch.queue.appendleft(todo)
                if by_itself:
                    _log.warning("not yet", batch=batch.machine.batch.hex(), point=todo.point, why=why)
                    self.later(RETRY, lambda: self.resume(batch))
            case _:
                self.give(batch, outcome)

    def _failed(self, batch: Batch, todo: _Todo, error: Exception) -> None:
        where = {"batch": batch.machine.batch.hex(), "point": todo.point}
        if isinstance(error, Error):
            _log.warning("command failed", **where, why=str(error))
        else:
            _log.exception("command failed", **where)
        if todo.fallible and isinstance(todo.command, do.FALLIBLE):
            while batch.queue and batch.queue[0].step == todo.step:
                batch.queue.popleft()
            if batch.machine.may_fail:
                self.give(
                    batch, Failed(error.what if isinstance(error, Error) else "the agent failed; its log says more")
                )

    def _run(self) -> None:
        while not self._stopping:
            for descriptor, _ in self._poll.poll(self._left()):
                if descriptor == self._wake:
                    os.eventfd_read(self._wake)
                elif descriptor in self._readers:
                    self._guarded(self._readers[descriptor])
            while self._calls:
                self._guarded(self._calls.popleft())
            while self._timers and self._timers[0][0] <= time.monotonic():
                self._guarded(heapq.heappop(self._timers)[2])

    def _left(self) -> float | None:
        if self._calls:
            return 0
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - time.monotonic()) * 1000 + 0.5

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            _log.exception("the engine was given something that fails")
