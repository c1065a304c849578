"""What the agent does, told to those who watch; a slow watcher misses events and learns how many."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any, cast

from google.protobuf.timestamp_pb2 import Timestamp

from migrate.agent.v1 import migration_pb2 as pb

__all__ = ["Events"]

_ROOM = 1000  # events that wait for a watcher


class _Watcher:
    def __init__(self, kinds: frozenset[int]) -> None:
        self.kinds = kinds
        self.queue: asyncio.Queue[pb.WatchResponse] = asyncio.Queue(_ROOM)
        self.missed = 0


class Events:
    """Belongs to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watchers: set[_Watcher] = set()

    def tell(self, kind: int, **fields: Any) -> None:
        """Something happened; ``kind`` is one of EventKind. From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._tell, kind, fields)

    async def watch(self, kinds: frozenset[int]) -> AsyncGenerator[pb.WatchResponse, None]:
        """Events of these kinds, or of all, from now on."""
        watcher = _Watcher(kinds)
        self._watchers.add(watcher)
        try:
            while True:
                yield await watcher.queue.get()
        finally:
            self._watchers.discard(watcher)

    def _tell(self, kind: int, fields: dict[str, Any]) -> None:
        if not self._watchers:
            return
        now = Timestamp()
        now.GetCurrentTime()
        for watcher in self._watchers:
            if watcher.kinds and kind not in watcher.kinds:
                continue
            try:
                watcher.queue.put_nowait(
                    pb.WatchResponse(time=now, kind=cast(Any, kind), missed=watcher.missed, **fields)
                )
                watcher.missed = 0
            except asyncio.QueueFull:
                watcher.missed += 1
