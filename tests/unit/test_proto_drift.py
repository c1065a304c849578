"""The checked-in stubs and the API reference are what scripts/generate makes of proto/, and the contract is in them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from migrate.agent.v1 import handoff_pb2, handoff_pb2_grpc, migration_pb2, types_pb2
from migrate.tcpstate import TcpState

ROOT = Path(__file__).parents[2]


def generate(*arguments: str, script: Path = ROOT / "scripts/generate") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)


def test_nothing_is_stale() -> None:
    """Makes .venv-generate if it is missing, so the comparison always takes place."""
    check = generate("--check")
    assert check.returncode == 0, check.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what scripts/generate reads and writes, with the environment of the original."""
    for name in ("proto", "migrate/agent/v1", "docs/grpc-api.md", "scripts/generate"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", ROOT / name, tmp_path / name], check=True)
    (tmp_path / ".venv-generate").symlink_to(ROOT / ".venv-generate")
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "stale"),
    [
        ("proto/tcpmig/v1/types.proto", "uint32 pid = 5;", "uint64 pid = 5;", "migrate/agent/v1/types_pb2.py "),
        ("proto/tcpmig/v1/handoff.proto", "// I own none, finally.", "// I own nothing.", "docs/grpc-api.md "),
        ("migrate/agent/v1/migration_pb2_grpc.py", "/tcpmig.v1.Migration/Watch", "/x/Watch", "migration_pb2_grpc.py "),
        ("docs/grpc-api.md", "I hold all but the refused.", "I hold all.", "docs/grpc-api.md "),
    ],
)
def test_the_check_notices(copy: Path, name: str, old: str, new: str, stale: str) -> None:
    edit(copy / name, old, new)
    check = generate("--check", script=copy / "scripts/generate")
    assert check.returncode == 1
    assert f"{stale}is stale" in check.stderr


def test_a_field_without_a_comment_is_refused(copy: Path) -> None:
    edit(copy / "proto/tcpmig/v1/types.proto", "  // The phase.\n", "")
    check = generate("--check", script=copy / "scripts/generate")
    assert check.returncode == 1
    assert "types.proto: no comment above" in check.stderr


def test_generate_mends_what_the_check_finds(copy: Path) -> None:
    edit(copy / "migrate/agent/v1/types_pb2.py", "Problem", "Trouble")
    (copy / "migrate/agent/v1/old_pb2.py").touch()
    assert generate(script=copy / "scripts/generate").returncode == 0
    assert generate("--check", script=copy / "scripts/generate").returncode == 0
    assert not (copy / "migrate/agent/v1/old_pb2.py").exists()


def test_the_project_asks_for_no_older_runtime_than_the_stubs_accept() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    stub = Path(handoff_pb2.__file__).read_text()
    generated_with = re.search(r"^# Protobuf Python Version: (.+)$", stub, re.MULTILINE)
    assert generated_with
    assert f"protobuf>={generated_with[1]}" in dependencies
    [grpcio] = (line.removeprefix("grpcio>=") for line in dependencies if line.startswith("grpcio>"))
    assert version(grpcio) >= version(handoff_pb2_grpc.GRPC_GENERATED_VERSION)


def version(text: str) -> list[int]:
    return [int(part) for part in text.split(".")]


def test_the_calls_are_those_of_the_contract() -> None:
    calls = {
        f"{service.name}.{call.name}": (call.client_streaming, call.server_streaming)
        for module in (migration_pb2, handoff_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for call in service.methods
    }
    assert calls == {
        "Handoff.Check": (False, False),
        "Handoff.Forward": (False, False),
        "Migration.ListConnections": (False, True),
        "Migration.Dump": (True, True),
        "Migration.Restore": (True, True),
        "Migration.Migrate": (False, True),
        "Migration.Drain": (False, True),
        "Migration.Abort": (False, False),
        "Migration.Resolve": (False, False),
        "Migration.Watch": (False, True),
        "Handoff.Transfer": (True, True),
    }
    assert migration_pb2.DESCRIPTOR.package == "tcpmig.v1"


def test_states_have_the_numbers_of_the_kernel() -> None:
    values = {value.name.removeprefix("TCP_STATE_"): value.number for value in types_pb2.TcpState.DESCRIPTOR.values}
    assert values.pop("UNSPECIFIED") == 0
    assert values == {state.name: state.value for state in TcpState}
