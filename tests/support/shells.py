"""A secure shell to this machine under two of its addresses: its own server, key and client, in one folder."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.ranks import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDRESSES = ("127.0.0.1", "127.0.0.2")

_SERVER = """\
ListenAddress 127.0.0.1:{port}
ListenAddress 127.0.0.2:{port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
"""
_CLIENT = """\
#!/bin/sh
exec {ssh} -F none -p {port} -i {folder}/key -o StrictHostKeyChecking=no \\
    -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"
"""


def _server() -> str | None:
    # It is not in the PATH of everybody.
    return shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")


def why_no_shells(*programs: str) -> str:
    """Say what is missing for it; empty when nothing is."""
    if sys.platform != "linux":
        return "needs the addresses 127.0.0.1 and 127.0.0.2"
    missing = [name for name in ("ssh", "ssh-keygen", *programs) if shutil.which(name) is None]
    missing += ["sshd"] if _server() is None else []
    return f"no program {', '.join(missing)} (Debian: openssh-server, pdsh, openmpi-bin, mpich)" if missing else ""


def needs_shells(*programs: str) -> pytest.MarkDecorator:
    why = why_no_shells(*programs)
    return pytest.mark.skipif(bool(why), reason=why or "all there")


@dataclass
class Shells:
    """A running server, and the folder `programs` that holds an `ssh` that reaches it."""

    programs: Path


@contextlib.contextmanager
def shells(folder: Path) -> Iterator[Shells]:
    """Run a server as this user until the block ends."""
    server, client = _server(), shutil.which("ssh")
    assert server is not None
    assert client is not None
    port = free_port()
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "config").write_text(_SERVER.format(folder=folder, port=port))
    programs = folder / "programs"
    programs.mkdir()
    (programs / "ssh").write_text(_CLIENT.format(ssh=client, folder=folder, port=port))
    (programs / "ssh").chmod(0o755)
    # The server refuses to run without it, and a machine without a server has not made it.
    with contextlib.suppress(PermissionError):
        Path("/run/sshd").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [server, "-D", "-e", "-f", str(folder / "config")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _wait_until_open(process, port)
        yield Shells(programs)
    finally:
        process.terminate()
        process.communicate(timeout=30)


def _wait_until_open(process: subprocess.Popen[str], port: int, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    for address in ADDRESSES:
        while True:
            try:
                socket.create_connection((address, port), timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    pytest.skip(f"sshd does not run here: {process.communicate()[1].strip()}")
                assert time.monotonic() < deadline, "the server does not listen"
                time.sleep(0.05)
