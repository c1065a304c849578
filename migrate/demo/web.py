"""Two of Debian's nginx, one on each host, with the same small files."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

from migrate.demo.network import ADDRESS, Host, program
from migrate.errors import HostError
from migrate.kernel import netns

__all__ = ["PORT", "make_files", "serve"]

PORT = 80
_FILES, _LARGEST = 64, 65536  # bytes
_READY = 10.0  # seconds for nginx to start in

# Every answer says which host it is from, and repeats what the client sent it.
_CONFIGURATION = """
user root;
daemon off;
pid nginx.pid;
error_log error.log notice;
worker_processes 1;
worker_shutdown_timeout 1s;
worker_rlimit_nofile {descriptors};
events {{ worker_connections {descriptors}; }}
http {{
    access_log off;
    sendfile on; tcp_nopush on;  # as Debian has it: a small answer is one segment
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    default_type application/octet-stream;
    keepalive_timeout 1h;
    keepalive_requests 1000000;
    server {{
        listen {port} backlog=4096;
        root {root};
        add_header X-Host {host};
        add_header X-Echo $arg_echo;
    }}
}}
"""


def make_files(directory: Path) -> dict[str, str]:
    """Files of random bytes, most of them small: name and SHA-256 (hexadecimal) of each."""
    directory.mkdir()
    digests = {}
    for number in range(_FILES):
        data = random.randbytes(int(_LARGEST ** random.random()))
        (directory / str(number)).write_bytes(data)
        digests[str(number)] = hashlib.sha256(data).hexdigest()
    return digests


def serve(host: Host, files: Path, directory: Path, descriptors: int, opened: ExitStack) -> None:
    """Start nginx on a host, to run until ``opened`` ends, and wait until it listens.

    ``descriptors`` is how many files and connections it may have open. Raises HostError with nginx's words.
    """
    directory.mkdir()
    text = _CONFIGURATION.format(descriptors=descriptors, port=PORT, root=files, host=host.name)
    (directory / "nginx.conf").write_text(text)
    # nginx would outlive us if we were killed.
    guarded = [program("setpriv", "util-linux"), "--pdeathsig", "TERM", "--", program("nginx", "nginx")]
    command = [*guarded, "-p", str(directory), "-c", "nginx.conf", "-e", "error.log"]
    with (directory / "output").open("wb") as output:
        process = host.start(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    opened.callback(_stop, process)
    limit = time.monotonic() + _READY
    while not _answers(host):
        if process.poll() is not None or time.monotonic() > limit:
            raise HostError(f"nginx does not start: {(directory / 'output').read_text(errors='replace').strip()}")
        time.sleep(0.005)


def _answers(host: Host) -> bool:
    with netns.entered(host.netns), socket.socket() as probe:
        return probe.connect_ex((ADDRESS, PORT)) == 0


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
