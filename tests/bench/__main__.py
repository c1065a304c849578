"""The benches by name: ``python -m tests.bench core``. Best through scripts/bench."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

VERBS = {
    "core": "dump, hold, restore and the command line on one machine",
    "handoff": "two agents: connections a second, blackouts, memory",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description="Measure; a table on stderr, JSON on stdout.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary)
        verb.add_argument("--json", type=Path, metavar="FILE", help="write the JSON there as well")
        verb.add_argument("--quick", action="store_true", help="small and once: does it run? its numbers mean nothing")
    arguments = parser.parse_args()
    report = import_module(f"tests.bench.{arguments.verb}").run(quick=arguments.quick)
    report.print_table()
    text = json.dumps(report.as_json(), indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)
    return 0 if arguments.quick or all(number["ok"] for number in report.numbers) else 1


if __name__ == "__main__":
    sys.exit(main())
