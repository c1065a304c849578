"""Who may import whom: the order of the layers is that of docs/architecture.md, and each uses only those above it."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "migrate"
GENERATED = PACKAGE / "agent" / "v1"

LAYERS = (
    "errors",
    "tcpstate",
    "obstacle",
    "fourtuple",
    "ici",
    "sealed",
    "relocate",
    "kernel",
    "unconnected",
    "checkpoint",
    "refill",
    "restore",
    "rebuild",
    "pathstate",
    "bulk",
    "hold",
    "quarantine",
    "quiet",
    "selection",
    "steer",
    "adopt",
    "handoff",
    "agent",
    "app",
    "demo",
    "cli",
)
# Of kernel/ each module is one interface and knows no other, but for what they all stand on and what is named here:
# netfilter's transport and the messages it carries, the table of socket options and what reads them, and the probe,
# which tries them all.
KERNEL_BASE = {"uapi", "netns", "tcpinfo"}
KERNEL_NEIGHBOURS = {
    "batch": {"sockopt", "uring"},
    "congestion": {"bpf", "btf"},
    "fingerprint": {"btf", "option_table", "sockmem"},
    "nf_tables": {"nfnetlink"},
    "nflog": {"nfnetlink"},
    "nft_table": {"nf_tables", "nfnetlink"},
    "nft": {"nf_tables", "nft_table", "nflog"},
    "option_values": {"option_table"},
    "processors": {"priority"},
    "snapshot": {"btf", "sockmem"},
    "sockmem": {"bpf", "btf"},
    "segment": {"route"},
    "timewait": {"bpf", "btf"},
    "options": {"fingerprint", "option_table", "option_values"},
}
PROBE = "probe"
HEAVY = {"argparse", "asyncio", "grpc", "prometheus_client", "pyroute2", "rich", "sqlite3"}
LONGEST = 400  # lines


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if GENERATED not in path.parents)


def dotted(path: Path) -> str:
    """The module's name without the leading package: ``kernel.nft``; empty for migrate/__init__.py itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def is_module(name: str) -> bool:
    file = PACKAGE.joinpath(*name.split("."))
    return file.is_dir() or file.with_suffix(".py").exists()


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, wherever it does so, for type checkers too."""
    package = ["migrate", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(), path)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = ".".join(
                    [*(package[: len(package) - level + 1] if level else []), *([module] if module else [])]
                )
                for alias in names:
                    yield node.lineno, f"{base}.{alias.name}"
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name (without the package's) of the project's own modules that a file imports."""
    for line, name in imported(path):
        top, _, rest = name.partition(".")
        if top == "migrate" and rest != "__version__":
            yield line, rest if is_module(rest) else rest.rpartition(".")[0]


def violations(path: Path) -> Iterator[str]:
    me = dotted(path)
    layer, _, module = me.partition(".")
    for line, name in own_imports(path):
        there, _, used = name.partition(".")
        where = f"{path.relative_to(ROOT)}:{line} imports migrate.{name}".rstrip(".")
        if not name:
            yield f"{where}: the package's face is for its users"
        elif LAYERS.index(there) > LAYERS.index(layer):
            yield f"{where}, which lies below {layer}"
        elif layer == there == "kernel" and module != PROBE:
            known = {module} | KERNEL_BASE | KERNEL_NEIGHBOURS.get(module, set())
            if used not in known:
                yield f"{where}: of its neighbours {me} may know {', '.join(sorted(known))}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_the_layers_above_it(path: Path) -> None:
    assert path == PACKAGE / "__init__.py" or dotted(path).partition(".")[0] in LAYERS, "a module outside of the layers"
    if path != PACKAGE / "__init__.py":
        assert list(violations(path)) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("errors.py", "from migrate.ici import Ici"),
        ("ici.py", "from .kernel import netns"),
        ("ici.py", "from . import hold"),
        ("kernel/diag.py", "from migrate.kernel.nflog import Listener"),
        ("kernel/nflog.py", "from migrate.kernel import nft"),
        ("kernel/nft.py", "def f():\n    import migrate.checkpoint"),
        ("steer/vip.py", "if TYPE_CHECKING:\n    from migrate.agent import client"),
        ("adopt/child.py", "importlib.import_module('migrate.cli.main')"),
        ("hold.py", "from migrate import dump"),
    ],
)
def test_the_rule_notices(file: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "migrate"
    for path in modules():
        copy = package / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    for name in ("hold.py", "checkpoint.py", "kernel/nflog.py", "kernel/nft.py", file):
        (package / name).touch()
    (package / file).write_text(line)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", package)
    assert len(list(violations(package / file))) == 1


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_stays_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("use", ["", "[getattr(migrate, name) for name in migrate.__all__]"], ids=["import", "names"])
def test_import_migrate_is_cheap(use: str) -> None:
    program = f"import sys; before = set(sys.modules); import migrate; {use}\nprint(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert HEAVY.isdisjoint(done.stdout.split())


def test_every_library_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {canonical(re.split(r"[\[<>=~! ;]", line)[0]) for lines in requirements for line in lines}
    distributions = importlib.metadata.packages_distributions()
    for path in PACKAGE.rglob("*.py"):
        for line, name in imported(path):
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "migrate":
                offered = {canonical(distribution) for distribution in distributions.get(top, [])}
                assert offered & declared, f"{path.relative_to(ROOT)}:{line} imports {name}: not in pyproject.toml"


def canonical(distribution: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
