"""The pipes through which a notebook shows what ranks print."""

from __future__ import annotations

import contextlib
import io
import threading
from pathlib import Path

import pytest

from paceline.launch.notebook.pipes import RankPipes

LINE = b"x" * 99 + b"\n"
MORE_THAN_A_PIPE_HOLDS = 20_000
"""Lines: 2 MB. A pipe of Linux holds 64 KiB."""


class Failing(io.StringIO):
    """The stream of a cell that fails at its first writes."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    def write(self, text: str) -> int:
        if self.failures:
            self.failures -= 1
            raise BrokenPipeError("the kernel is gone")
        return super().write(text)


def print_as_rank(folder: Path, data: bytes) -> bool:
    """Write into the pipe of rank 0 as its process does; whether it got through in time."""

    def write() -> None:
        with (folder / "rank_0.out").open("wb") as pipe:
            pipe.write(data)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


@pytest.mark.parametrize("failures", [1, 10**9])
def test_a_rank_never_blocks_on_a_cell_that_fails(
    failures: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cell = Failing(failures)
    with contextlib.redirect_stdout(cell), RankPipes(tmp_path, 1) as pipes:
        assert print_as_rank(pipes.folder, LINE)
        assert print_as_rank(pipes.folder, LINE * MORE_THAN_A_PIPE_HOLDS)
    kept = len(cell.getvalue())
    if failures == 1:
        assert kept > 0
    lost = (MORE_THAN_A_PIPE_HOLDS + 1) * len(LINE) - kept
    assert f"{lost} characters that ranks printed are lost" in caplog.text
    assert "BrokenPipeError: the kernel is gone" in caplog.text


def test_a_closed_stream_is_a_failure_like_any_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cell = io.StringIO()
    cell.close()
    with contextlib.redirect_stdout(cell), RankPipes(tmp_path, 1) as pipes:
        assert print_as_rank(pipes.folder, LINE * MORE_THAN_A_PIPE_HOLDS)
    assert "ValueError" in caplog.text


def test_what_an_encoding_lacks_is_escaped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = io.BytesIO()
    cell = io.TextIOWrapper(written, encoding="ascii")
    with contextlib.redirect_stdout(cell), RankPipes(tmp_path, 1) as pipes:
        assert print_as_rank(pipes.folder, "fünf\n".encode())
    assert written.getvalue() == b"f\\xfcnf\n"
    assert not caplog.text
