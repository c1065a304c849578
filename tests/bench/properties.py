"""What a record weighs, how often a queue is copied, and that a restored connection sends and tunes as before."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from statistics import median
from typing import Any

from migrate import Ici, activate, dump, release, restore, write_records
from migrate.kernel import sockopt, tcpinfo, uapi
from tests.bench.measure import Report, in_own_network, narrate, spread

MIB = 1 << 20
QUEUE = 8 * MIB
GROWN = 0.25  # how far a buffer tunes itself varies by a factor of two from run to run; a dead one stays below 0.02
BULK = 64 * MIB  # each way: enough for the buffers to grow to their limits on a loopback of 1500-byte segments


def measure(report: Report) -> None:
    narrate("records, copies, segment size, autotuning")
    found = in_own_network("properties", 1 if report.quick else 3)
    report.number("record of an idle connection", found["record"], 512, "bytes")
    report.number("copies of a queue on its way to the file", found["copies"], 2, "copies", peak=found["peak"])
    before, after = found["untouched"], found["restored"]
    report.number(
        "bytes a segment after a restore, to before", after["segment"] / before["segment"], 0.99, "x", at_least=True
    )
    for buffer in ("receive buffer", "send buffer"):
        grown = after[buffer] / before[buffer]
        report.number(f"{buffer} after bulk, restored to untouched", grown, GROWN, "x", at_least=True)
    report.tables["a record, microseconds"] = {"encode": found["encode_us"], "decode": found["decode_us"]}
    report.tables["after 64 MiB each way"] = {"untouched": before, "restored": after}


class Pair:
    """A connection to ourselves: ``near`` is the end that moves."""

    def __init__(self, *, buffer: int = 0) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            if buffer:
                listener.setsockopt(socket.SOL_SOCKET, uapi.SO_RCVBUFFORCE, buffer)
            self.far = socket.create_connection(listener.getsockname())
            self.near = listener.accept()[0]

    def move(self) -> None:
        record = dump(self.near)
        release(self.near)
        self.near.close()
        self.near = restore(record, activate=False)
        activate(self.near)

    def figures(self) -> dict[str, Any]:
        info = tcpinfo.parse(sockopt.tcp_info(self.near))
        memory = sockopt.meminfo(self.near)
        return {
            "segment": round(info.bytes_sent / info.data_segs_out, 1),
            "mss": info.snd_mss,
            "receive buffer": memory[1],
            "send buffer": self.near.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
        }

    def close(self) -> None:
        self.far.close()
        self.near.close()


def _record() -> dict[str, Any]:
    """Size and cost of an idle connection's record; one that has carried something, so that no field is at zero."""
    pair = Pair()
    _exchange(pair, MIB)
    record = dump(pair.near)
    data = record.encode()
    pair.close()
    return {
        "record": len(data),
        "encode_us": spread(_microseconds(record.encode) for _ in range(9)),
        "decode_us": spread(_microseconds(lambda: Ici.decode(data)) for _ in range(9)),
    }


def _microseconds(call: Any, times: int = 2000) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) * 1e6 / times


def _copies() -> dict[str, Any]:
    """The kernel's copy to the file is one; the memory in use at the peak tells of the others."""
    pair = Pair(buffer=4 * QUEUE)
    pair.far.sendall(bytes(QUEUE))
    with tempfile.TemporaryFile() as file:
        tracemalloc.start()
        write_records(file.fileno(), [dump(pair.near)])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if file.seek(0, 2) < QUEUE:
            raise SystemExit("the queue is not in the file")
    pair.close()
    return {"copies": 1 + round(peak / QUEUE, 1), "peak": peak}


def _exchange(pair: Pair, length: int, *, left_to_send: int = 0, left_to_read: int = 0) -> None:
    """Both ends send ``length`` bytes and read what comes, besides what is queued already."""
    piece = bytes(MIB)

    def send(sock: socket.socket) -> None:
        for _ in range(length // MIB):
            sock.sendall(piece)

    def read(sock: socket.socket, total: int) -> None:
        while total:
            total -= len(sock.recv(min(total, MIB)))

    threads = [
        threading.Thread(target=send, args=(pair.far,)),
        threading.Thread(target=send, args=(pair.near,)),
        threading.Thread(target=read, args=(pair.far, length + left_to_send)),
        threading.Thread(target=read, args=(pair.near, length + left_to_read)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _grown(*, moved: bool) -> dict[str, Any]:
    """A connection with something in both queues, then bulk both ways."""
    pair = Pair()
    pair.far.sendall(bytes(64 << 10))
    pair.near.setblocking(False)
    queued = 0
    try:
        while True:
            queued += pair.near.send(bytes(64 << 10))
    except BlockingIOError:
        pair.near.setblocking(True)
    if moved:
        pair.move()
    _exchange(pair, BULK, left_to_send=queued, left_to_read=64 << 10)
    figures = pair.figures()
    pair.close()
    return figures


def main() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up", "mtu", "1500"], check=True)
    runs = [(_grown(moved=False), _grown(moved=True)) for _ in range(int(sys.argv[1]))]
    untouched, restored = (
        {name: median(one[name] for one in each) for name in each[0]} for each in zip(*runs, strict=True)
    )
    json.dump({**_record(), **_copies(), "untouched": untouched, "restored": restored}, sys.stdout)


if __name__ == "__main__":
    main()
