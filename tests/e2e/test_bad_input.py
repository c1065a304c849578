"""What people type and hosts lack: each with its exact message and exit code; nothing is touched, nothing is left."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from migrate.fourtuple import FourTuple
from migrate.kernel import sockopt, uapi
from migrate.kernel.nft import tables
from tests.fix_netns import Lan
from tests.killing import Killer
from tests.peers import connect
from tests.waiting import until

IPPROTO_MPTCP = 262  # include/uapi/linux/in.h
NEVER = 4194304  # above the highest pid_max that Linux allows: no process has it


class Scene:
    """A connection from a client to host a whose owner is this process; host b is elsewhere."""

    def __init__(self, net: Lan, killer: Killer, directory: Path) -> None:
        self.net, self.killer, self.directory = net, killer, directory
        self.a, self.b = net.host("a"), net.host("b")
        self.client, self.server = connect(net.host("client"), self.a)
        self.client.sendall(b"unread")
        until(lambda: sockopt.received_length(self.server) == 6)
        self.name = str(FourTuple.parse("{}:{},{}:{}".format(*self.server.getsockname(), *self.server.getpeername())))
        self.file = directory / "new.ici"
        self.good = directory / "good.ici"
        killer.run("dump", self.name, "-o", self.good, "--leave-running", "--netns", self.a.netns)

    def text(self, template: str) -> str:
        """What a case writes as {name}, {pid} and so on."""
        return template.format(
            name=self.name,
            local=self.name.partition(",")[0],
            pid=os.getpid(),
            fd=self.server.fileno(),
            directory=self.directory,
            file=self.file,
            good=self.good,
            a=self.a.netns,
            b=self.b.netns,
        )

    def untouched(self) -> None:
        """Nothing is frozen, nothing is held, nothing was written."""
        assert not sockopt.in_repair(self.server)
        assert sockopt.received_length(self.server) == 6
        for host in (self.a, self.b):
            with host.entered():
                until(lambda: not tables(), what="no hold is left")
        assert not self.file.exists()
        assert not [path.name for path in self.directory.iterdir() if path.name.startswith(".")]
        self.server.sendall(b"x")
        assert self.client.recv(1) == b"x"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("bad-input")
    with contextlib.ExitStack() as stack:
        net = Lan(("client", "a", "b"))
        stack.callback(net.close)
        state = tmp_path_factory.mktemp("state")
        os.chmod(state, 0o700)
        scene = Scene(net, stack.enter_context(Killer({"TCPMIG_STATE": str(state)})), directory)
        with scene.client, scene.server:
            yield scene


NEW = ("-o", "{file}", "--netns", "{a}")
HINT = "\n  hint: "
WORDS: list[tuple[Sequence[str], int, str]] = [
    # whose words they are: usage, exit code 2
    (["dump", *NEW], 2, f"tcpmig: which connections?{HINT}give CONN or one of --local, --remote, --state, --pid"),
    (
        ["dump", "{name}", "--netns", "{a}"],
        2,
        f"tcpmig dump: the following arguments are required: -o/--output{HINT}tcpmig dump --help",
    ),
    (["dump", "--fd", "3", *NEW], 2, "tcpmig: --fd needs --pid: a descriptor belongs to a process"),
    (
        ["dump", "{local}", *NEW],
        2,
        "tcpmig: '{local}': a connection is two ends with one comma between them"
        f"{HINT}write 10.0.0.1:80,10.0.0.9:53972 or [fd00::1]:80,[fd00::9]:53972",
    ),
    (
        ["dump", "--local", "10.0.0.2:http", *NEW],
        2,
        f"tcpmig: '10.0.0.2:http': 'http' is no port number{HINT}write 10.0.0.1:80, [fd00::1]:80, or the address alone",
    ),
    (
        ["dump", "{name}", "--hold", "long", *NEW],
        2,
        f"tcpmig dump: argument --hold: 'long' is no number of seconds{HINT}tcpmig dump --help",
    ),
    (
        ["dump", "{name}", "--when-quiet", "-1", *NEW],
        2,
        f"tcpmig dump: argument --when-quiet: -1 is not between 0 and 86400 seconds{HINT}tcpmig dump --help",
    ),
    (
        ["dump", "{name}", "--steer", "vip", *NEW],
        2,
        f"tcpmig: 'vip' is no way to steer{HINT}write vip:DEV, as in vip:eth0",
    ),
    (["dump", "{name}", *NEW, "--", "cat"], 2, f"tcpmig: dump takes no command after --{HINT}tcpmig --help"),
    (
        ["dump", "{name}", "-o", "{good}", "--netns", "{a}"],
        2,
        f"tcpmig: '{{good}}' exists, and may hold the only copy of a connection{HINT}give another name, or remove it",
    ),
    (
        ["restore", "{good}", "--netns", "{b}"],
        2,
        "tcpmig: who shall own the connections?"
        f"{HINT}exactly one of: [--systemd] -- CMD, --relay HOST:PORT, --adopter PATH, --hold-open",
    ),
    (
        ["restore", "{good}", "--relay", "nowhere", "--netns", "{b}"],
        2,
        f"tcpmig: 'nowhere' is no server to relay to{HINT}write HOST:PORT, as in 127.0.0.1:80",
    ),
    # what is not there, or cannot be taken: exit code 1
    (["dump", "10.0.0.2:1,10.0.0.1:2", *NEW], 1, f"tcpmig: no connection here matches{HINT}tcpmig list shows them"),
    (
        ["dump", "{name}", "-o", "{file}", "--netns", "{b}"],
        1,
        f"tcpmig: no connection here matches{HINT}tcpmig list shows them",
    ),
    (
        ["dump", "{name}", "-o", "{file}", "--netns", "nowhere"],
        1,
        f"tcpmig: there is no network namespace 'nowhere'{HINT}`ip netns list` shows those with a name",
    ),
    (["dump", "--pid", str(NEVER), *NEW], 1, f"tcpmig: there is no process {NEVER}"),
    (["dump", "--pid", str(NEVER), "--fd", "0", *NEW], 1, f"tcpmig: there is no process {NEVER}"),
    (["dump", "--pid", "{pid}", "--fd", "9999", *NEW], 1, "tcpmig: process {pid} has no descriptor 9999"),
    (
        ["dump", "{name}", "-o", "{directory}/no/x", "--netns", "{a}"],
        1,
        "tcpmig: writing '{directory}/no/x': No such file or directory [ENOENT]"
        f"{HINT}nothing was taken: the connections go on here",
    ),
    (
        ["dump", "{name}", "--when-quiet", "0.1", *NEW],
        1,
        f"tcpmig: {{name}}: it was never quiet{HINT}give --when-quiet more seconds",
    ),
    (
        ["dump", "{name}", "--steer", "vip:eth7", *NEW],
        1,
        "tcpmig: there is no device 'eth7' here",
    ),
    (["restore", "{directory}/no", "--netns", "{b}", "--", "cat"], 1, "tcpmig: there is no file '{directory}/no'"),
    (
        ["restore", "{directory}", "--netns", "{b}", "--", "cat"],
        1,
        "tcpmig: opening '{directory}': Is a directory [EISDIR]",
    ),
    (
        ["restore", "{good}", "--netns", "{a}", "--", "cat"],
        1,
        f"tcpmig: {{name}}: this connection exists here already{HINT}tcpmig list shows its owner",
    ),
    (["show", "{directory}/no"], 1, "tcpmig: there is no file '{directory}/no'"),
    # what this host cannot: exit code 4
    (
        ["restore", "{good}", "--netns", "{b}", "--", "/no/command"],
        4,
        f"tcpmig: there is no command '/no/command'{HINT}install it, or give its path",
    ),
    (
        ["restore", "{good}", "--netns", "{b}", "--hold", "0", "--", "cat"],
        4,
        "tcpmig: restoring {name}: this host does not have the address of {local}"
        f"{HINT}let the address move first (ip address add …, or --steer vip:DEV)",
    ),
]


@pytest.mark.parametrize(
    ("words", "code", "said"), WORDS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_words(scene: Scene, words: Sequence[str], code: int, said: str) -> None:
    done = scene.killer.run(*map(scene.text, words))
    assert (done.stderr.rstrip("\n"), done.stdout, done.code) == (scene.text(said), "", code)
    scene.untouched()


def cut(data: bytes) -> bytes:
    return data[:-1]


def future(data: bytes) -> bytes:
    return data[:4] + b"\x09" + data[5:]


def gibibyte(data: bytes) -> bytes:
    return data[:8] + (1 << 30).to_bytes(4, "big") + data[12:]


def flipped(data: bytes) -> bytes:
    return data[:40] + bytes((data[40] ^ 1,)) + data[41:]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: b"", "holds no record, at byte 0"),
        (lambda data: b"\x7fELF" + bytes(1000), ": this is no ICI record, at byte 0, field header.magic"),
        (lambda data: data[:10], ": the record ends within its header, at byte 10"),
        (cut, ": the record ends after {short} of {body} bytes of its body, at byte {end}"),
        (future, ": the record has format version 9.{minor}, this reader knows 1.x, at byte 4, field header.major"
         + HINT + "read it with the tcpmig that wrote it"),
        (gibibyte, ": the body claims 1073741824 bytes, more than 268435456, at byte 8, field header.length"),
        (flipped, ": the checksum is wrong, the record is damaged, at byte 12, field header.crc32"),
        (lambda data: data + b"more", ": this is no ICI record, at byte {size}, field header.magic"),
    ],
    ids=["empty", "garbage", "cut in the header", "cut in the body", "future", "1 GiB", "bit flipped", "followed"],
)  # fmt: skip
def test_files(scene: Scene, damage: Callable[[bytes], bytes], said: str) -> None:
    data = scene.good.read_bytes()
    bad = scene.directory / "bad.ici"
    bad.write_bytes(damage(data))
    body = len(data) - 16
    said = said.format(short=body - 1, body=body, end=len(data) - 1, minor=data[5], size=len(data))
    for words in (["restore", str(bad), "--netns", scene.b.netns, "--", "cat"], ["show", "--json", str(bad)]):
        done = scene.killer.run(*words)
        assert (done.code, done.stderr.rstrip("\n").removeprefix(f"tcpmig: {str(bad)!r}").lstrip(" ")) == (
            0 if said.startswith("holds") and words[0] == "show" else 1,
            "" if said.startswith("holds") and words[0] == "show" else said,
        )
    scene.untouched()


def test_a_gibibyte_of_zeros_takes_no_memory(scene: Scene) -> None:
    bad = scene.directory / "bad.ici"
    for head in (b"", scene.good.read_bytes()[:8] + (200 << 20).to_bytes(4, "big") + bytes(4)):
        with bad.open("wb") as file:
            file.write(head)
            file.truncate(1 << 30)
        done = tcpmig(["prlimit", f"--as={1 << 30}"], "restore", bad, "--netns", scene.b.netns, "--", "cat")
        assert done.returncode == 1 and str(bad) in done.stderr, done.stderr
    scene.untouched()


def tcpmig(before: Sequence[str | Path], *words: str | Path) -> subprocess.CompletedProcess[str]:
    """A command line behind another command."""
    command = [*before, sys.executable, "-m", "migrate.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_without_privileges(scene: Scene) -> None:
    """Root without capabilities: a connection of a process that has them cannot be taken, nor one be built."""
    nothing = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    done = tcpmig(["ip", "netns", "exec", scene.a.netns, *nothing], "dump", scene.name, "-o", scene.file)
    assert done.returncode in (1, 4) and "no process has it open" in done.stderr, done.stderr
    child = scene.a.popen([*nothing, "sleep", "60"], stdin=scene.server, stdout=subprocess.DEVNULL)
    try:
        own = ["dump", "--pid", str(child.pid), "--fd", "0", "-o", str(scene.file)]
        done = tcpmig(["ip", "netns", "exec", scene.a.netns, *nothing], *own)
        assert done.returncode == 4, done.stderr
        assert done.stderr.splitlines()[-1] == "  hint: needs CAP_NET_ADMIN; run as root, or inside `unshare -Urn`"
    finally:
        child.kill()
        child.wait()


def test_a_directory_that_may_not_be_written(scene: Scene) -> None:
    room = scene.directory / "closed"
    room.mkdir(0o500)
    obeys = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    done = tcpmig(obeys, "dump", scene.name, "-o", room / "x", "--netns", scene.a.netns)
    assert (done.returncode, done.stderr) == (
        4,
        f"tcpmig: writing '{room}/x': not permitted\n  hint: nothing was taken: the connections go on here\n",
    )
    scene.untouched()


def test_a_full_disk(scene: Scene) -> None:
    room = scene.directory / "full"
    room.mkdir()
    small = f"mount -t tmpfs -o size=4k tmpfs {room} && head -c 4096 /dev/zero > {room}/rest; "
    words = f"dump {scene.name} -o {room}/x --netns {scene.a.netns}"
    command = f"{small} {sys.executable} -m migrate.cli {words}; code=$?; ls -A {room}; exit $code"
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "rest\n"), done.stderr
    assert done.stderr.endswith(
        f"tcpmig: writing '{room}/x': No space left on device [ENOSPC]\n"
        "  hint: nothing was taken: the connections go on here\n"
    )
    scene.untouched()


@pytest.mark.parametrize("limit", [4, 8, 11, 14])
def test_no_descriptor_left(scene: Scene, limit: int) -> None:
    """Wherever the limit strikes, in dump or in restore."""
    imports = "import resource, sys, migrate.cli.main, migrate.cli.dump, migrate.cli.restore"
    limited = f"resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))"
    program = f"{imports}; {limited}; sys.exit(migrate.cli.main.main())"
    for words in (
        ["dump", scene.name, "-o", str(scene.file), "--netns", scene.a.netns, "--leave-running"],
        ["restore", str(scene.good), "--hold", "0", "--netns", scene.b.netns, "--", "cat"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False, timeout=60
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.stderr.startswith("tcpmig: ") and done.returncode in (0, 1, 4), done
        if done.returncode == 0:
            scene.file.unlink()
    scene.untouched()


def test_a_connection_that_ends_while_it_is_waited_for(scene: Scene) -> None:
    client, server = connect(scene.net.host("client"), scene.a)
    client.sendall(b"unread")
    with server:
        name = str(FourTuple.parse("{}:{},{}:{}".format(*server.getsockname(), *server.getpeername())))
        words = ["dump", name, "-o", str(scene.file), "--netns", scene.a.netns, "--when-quiet", "1"]
        command = [sys.executable, "-m", "migrate.cli", *words]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            with scene.a.entered():
                until(tables, what="the wait has begun")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (1, f"tcpmig: {name}: the connection ended while it was waited for\n")
    scene.untouched()


def test_multipath_is_refused_before_it_is_touched(scene: Scene) -> None:
    with contextlib.ExitStack() as opened:
        with scene.a.entered():
            listener = opened.enter_context(socket.socket(proto=uapi.IPPROTO_MPTCP))
        listener.bind((scene.a.ip4, 0))
        listener.listen()
        with scene.net.host("client").entered():
            client = opened.enter_context(socket.socket(proto=uapi.IPPROTO_MPTCP))
        client.connect(listener.getsockname())
        server = opened.enter_context(listener.accept()[0])
        words = ["dump", "--pid", str(os.getpid()), "--fd", str(server.fileno()), "--netns", scene.a.netns]
        done = scene.killer.run(*words, "-o", scene.file)
        assert done.code == 1
        assert "it is a Multipath TCP socket, which the kernel cannot repair" in done.stderr
        client.sendall(b"still here")
        assert server.recv(100) == b"still here"
    scene.untouched()


def test_several_owners_are_named(scene: Scene) -> None:
    """Several processes, not several descriptors of one."""
    with scene.server.dup():
        done = scene.killer.run("dump", scene.name, "-o", scene.file, "--netns", scene.a.netns, "--leave-running")
        assert "owners" not in done.stderr
        scene.file.unlink()
    child = scene.a.popen(["sleep", "60"], stdin=scene.server)
    done = scene.killer.run("dump", scene.name, "-o", scene.file, "--netns", scene.a.netns, "--leave-running")
    child.kill()
    child.wait()
    assert done.code == 0 and f"{scene.name} has several owners, and all of them lose it: " in done.stderr
    assert f"sleep (pid {child.pid}, fd 0)" in done.stderr
    scene.file.unlink()
