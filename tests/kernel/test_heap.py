"""The heap keeps the memory of queues, in huge pages where the host gives them, and has it only once it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
QUEUES = """
import re, resource, sys
from pathlib import Path
from migrate.kernel import heap

def heap_kib(name):
    of_heap = re.findall(r"\\[heap\\]\\n(.*?)VmFlags", Path("/proc/self/smaps").read_text(), re.S)
    return sum(int(re.search(name + r": +(\\d+) kB", text)[1]) for text in of_heap)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = heap_kib("Rss")
heap.keep()
asleep = heap_kib("Rss") - before
queues = [bytes([i % 250 + 1]) * 65537 for i in range(400)]
huge = heap_kib("AnonHugePages")
del queues
before = faults()
queues = [bytes([i % 250 + 1]) * 65537 for i in range(400)]
print(asleep, huge, faults() - before)
"""


@pytest.fixture(scope="module")
def seen() -> tuple[int, int, int]:
    """KiB that getting ready takes, KiB in huge pages with 26 MB of queues, page faults of the same queues again."""
    run = subprocess.run([sys.executable, "-c", QUEUES], check=True, capture_output=True, text=True)
    asleep, huge, faults = map(int, run.stdout.split())
    return asleep, huge, faults


def test_it_costs_little_until_used(seen: tuple[int, int, int]) -> None:
    """Address space is no memory."""
    assert seen[0] < 4096


def test_the_next_queues_need_no_new_pages(seen: tuple[int, int, int]) -> None:
    """400 queues of 16 pages each: without, there are 6,400 faults."""
    assert seen[2] < 400


def test_huge_pages(seen: tuple[int, int, int]) -> None:
    """Where the host gives them to whoever asks, most of the queues lie in such."""
    given = HUGE.exists() and "[never]" not in HUGE.read_text()
    assert seen[1] >= (16384 if given else 0)
