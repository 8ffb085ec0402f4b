"""Machines in a network, made on this one: network namespaces on a bridge, each with a name and hosts of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.support.marked import marked, none_marked

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

LETTERS = "abcdefgh"


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


@functools.cache
def why_no_hosts() -> str:
    """Say why this machine cannot be several; empty when it can."""
    name = f"pl{uuid.uuid4().hex[:6]}"
    try:
        _run("ip", "netns", "add", name)
        try:
            _run("ip", "netns", "exec", name, "unshare", "--uts", "--mount", "true")
            _run("ip", "link", "add", name, "type", "bridge")
            _run("ip", "link", "del", name)
        finally:
            _run("ip", "netns", "del", name)
    except FileNotFoundError as error:
        return f"no program {error.filename}"
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"
    return ""


needs_hosts = pytest.mark.skipif(sys.platform != "linux" or bool(why_no_hosts()), reason=why_no_hosts() or "no Linux")


@dataclass
class Running:
    """A command that runs on one of the hosts; its error output is collected as it comes."""

    process: subprocess.Popen[str]
    errors: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        for stream, into in ((self.process.stdout, self.lines), (self.process.stderr, self.errors)):
            assert stream is not None
            thread = threading.Thread(target=self._collect, args=(stream, into), daemon=True)
            thread.start()
            self.threads.append(thread)

    def _collect(self, stream: Iterator[str], into: list[str]) -> None:
        for line in stream:
            into.append(line)

    @property
    def out(self) -> str:
        return "".join(self.lines)

    @property
    def err(self) -> str:
        return "".join(self.errors)

    def wait_for(self, text: str, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.out + self.err:
            assert self.process.poll() is None, f"ended with {self.process.returncode}\n{self.out}\n{self.err}"
            assert time.monotonic() < deadline, f"{text!r} did not come\n{self.out}\n{self.err}"
            time.sleep(0.05)

    def end(self, seconds: float = 300.0) -> int:
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"it did not end in {seconds:.0f} s\n{self.out}\n{self.err}") from error
        for thread in self.threads:
            thread.join(timeout=5)
        return code

    def close(self) -> None:
        self.process.wait(timeout=60)
        for thread in self.threads:
            thread.join(timeout=5)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


class Hosts:
    """Hosts a, b, c… with the addresses 10.77.N.1, .2, .3… that reach each other over a bridge."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.marker = uuid.uuid4().hex
        self._id = f"pl{self.marker[:6]}"
        self._net = 1 + int(self.marker[:6], 16) % 250
        self.running: list[Running] = []
        self.names = LETTERS[:count]
        _run("ip", "link", "add", self._id, "type", "bridge")
        _run("ip", "link", "set", self._id, "up")
        for number, letter in enumerate(self.names, start=1):
            space, outside, inside = self._space(letter), f"{self._id}{letter}", f"eth{letter}{self.marker[:4]}"
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
            _run("ip", "link", "set", outside, "master", self._id, "up")
            _run("ip", "link", "set", inside, "netns", space)
            _run("ip", "-n", space, "addr", "add", f"10.77.{self._net}.{number}/24", "dev", inside)
            _run("ip", "-n", space, "link", "set", inside, "up")
            _run("ip", "-n", space, "link", "set", "lo", "up")

    def _space(self, letter: str) -> str:
        return f"{self._id}-{letter}"

    def address(self, letter: str) -> str:
        return f"10.77.{self._net}.{1 + LETTERS.index(letter)}"

    def start(self, letter: str, *words: str, names: str = "", env: Mapping[str, str] | None = None) -> Running:
        """Run a command on a host, whose name is its letter; `names` are lines of its /etc/hosts."""
        table = self.folder / f"hosts-{letter}-{len(self.running)}"
        table.write_text(f"127.0.0.1 localhost\n{self.address(letter)} {letter}\n{names}\n")
        script = f"hostname {letter}; mount --bind {shlex.quote(str(table))} /etc/hosts; exec {shlex.join(words)}"
        inside = ["unshare", "--uts", "--mount", "sh", "-c", script]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PACELINE_")}
        environment |= {"OMP_NUM_THREADS": "1", "TEST_MARKER": self.marker, **(env or {})}
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._space(letter), *inside],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=environment,
            start_new_session=True,
        )
        self.running.append(Running(process))
        return self.running[-1]

    def cut(self, letter: str) -> None:
        """Take a host off the network, as a broken cable would."""
        _run("ip", "link", "set", f"{self._id}{letter}", "down")

    def left(self) -> list[psutil.Process]:
        """Every process that still runs on these hosts."""
        return marked(self.marker)

    def none_left(self, within: float = 60.0) -> bool:
        return none_marked(self.marker, within)

    def close(self) -> None:
        for process in self.left():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for running in self.running:
            running.close()
        for letter in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "link", "del", f"{self._id}{letter}")
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "del", self._space(letter))
        with contextlib.suppress(subprocess.CalledProcessError):
            _run("ip", "link", "del", self._id)
