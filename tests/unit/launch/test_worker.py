from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import zipapp
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path


def run(
    folder: Path, *arguments: str, source: str | None = None, name: str = "script.py"
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any] | None]:
    if source is not None:
        (folder / name).write_text(textwrap.dedent(source))
    error_file = folder / "error.json"
    done = subprocess.run(
        [sys.executable, "-m", "paceline.launch.worker", *arguments],
        cwd=folder,
        env={**os.environ, "TORCHELASTIC_ERROR_FILE": str(error_file), "RANK": "1"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    return done, json.loads(error_file.read_text()) if error_file.exists() else None


def test_the_worker_imports_no_torch() -> None:
    code = "import sys, paceline.launch.worker; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_script_sees_what_python_would_show_it(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    (folder / "beside.py").write_text("")
    source = """
    import atexit, json, pickle, sys
    import beside
    class Thing: pass
    if __name__ == "__main__":
        seen = [sys.argv, sys.path[0], __name__, __file__, __spec__, __package__, sorted(globals())]
        atexit.register(lambda: pickle.dumps(Thing()))
        print(json.dumps(seen))
    """
    (folder / "script.py").write_text(textwrap.dedent(source))
    ours, account = run(tmp_path, "deep/script.py", "-a", "b")
    plain = subprocess.run(
        [sys.executable, "deep/script.py", "-a", "b"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (ours.stdout, ours.stderr, ours.returncode, account) == (plain.stdout, "", 0, None)


def test_a_module_sees_what_python_would_show_it(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    source = "import sys; from . import other\nprint(sys.argv, sys.path[0], __name__, __package__, __spec__.name)"
    for name in ("__main__", "part"):
        (package / f"{name}.py").write_text(source)
    (package / "other.py").write_text("")
    for module in ("package", "package.part"):
        ours, _ = run(tmp_path, "--module", module, "x")
        plain = subprocess.run(
            [sys.executable, "-m", module, "x"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert (ours.stdout, ours.stderr) == (plain.stdout, "")


def test_a_zip_application_sees_what_python_would_show_it(tmp_path: Path) -> None:
    source = """
    import json, pickle, sys
    import beside
    class Thing: pass
    if __name__ == "__main__":
        pickle.dumps(Thing())
        print(json.dumps([sys.argv, sys.path[0], __name__, __file__, __spec__.name, __package__]))
        if "fail" in sys.argv:
            raise RuntimeError("boom")
    """
    folder = tmp_path / "application"
    folder.mkdir()
    (folder / "beside.py").write_text("")
    (folder / "__main__.py").write_text(textwrap.dedent(source))
    zipapp.create_archive(folder, tmp_path / "app.pyz", interpreter="/usr/bin/env python3")
    for name in ("app.pyz", "application"):
        plain = subprocess.run([sys.executable, name, "-a"], cwd=tmp_path, capture_output=True, text=True, check=True)
        launched, account = run(tmp_path, name, "-a")
        assert account is None
        expected = json.loads(plain.stdout)
        # Python shows the path as it was written, a launched rank the whole one.
        expected[1], expected[3] = str(tmp_path / expected[1]), str(tmp_path / expected[3])
        assert json.loads(launched.stdout) == expected
    _, account = run(tmp_path, "app.pyz", "fail")
    assert account is not None
    assert account["paceline"]["headline"] == "RuntimeError: boom"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_lines_come_at_once_and_whole(tmp_path: Path, unbuffered: str) -> None:
    lines = (
        "import os, sys",
        "print('a', 1)",
        "print('warned', file=sys.stderr)",
        "print('part', end='')",
        "print(' of it')",
    )
    (tmp_path / "script.py").write_text("\n".join((*lines, "os._exit(0)")))
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)  # keeps apart what was written apart
    with ours, theirs:
        env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        command = [sys.executable, "-m", "paceline.launch.worker", "script.py"]
        subprocess.run(command, cwd=tmp_path, env=env, stdout=theirs.fileno(), stderr=theirs.fileno(), check=True)
        assert [ours.recv(100) for _ in range(3)] == [b"a 1\n", b"warned\n", b"part of it\n"]


def test_processes_can_be_spawned(tmp_path: Path) -> None:
    source = """
    import multiprocessing
    def square(x): return x * x
    if __name__ == "__main__":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.map(square, [3]))
    """
    done, _ = run(tmp_path, "script.py", source=source)
    assert (done.stdout, done.returncode) == ("[9]\n", 0)


def test_an_exception_is_written_down_and_not_printed(tmp_path: Path) -> None:
    source = """
    def inner(): raise ValueError("boom")
    inner()
    """
    done, account = run(tmp_path, "script.py", source=source)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert account is not None
    ours = account["paceline"]
    script = str(tmp_path / "script.py")
    assert (ours["kind"], ours["rank"], ours["where"]) == ("exception", 1, f"{script}:2")
    lines = ours["traceback"].splitlines()
    assert (lines[1].strip(), lines[-1]) == (f'File "{script}", line 3, in <module>', "ValueError: boom")
    assert "worker" not in ours["traceback"]
    assert account["message"]["extraInfo"]["py_callstack"] == ours["traceback"]


def test_an_exception_that_cannot_say_what_it_is(tmp_path: Path) -> None:
    source = """
    class Bad(Exception):
        def __str__(self): raise RuntimeError("no words")
    raise Bad
    """
    done, account = run(tmp_path, "script.py", source=source)
    assert (done.returncode, done.stderr) == (1, "")
    assert account is not None
    assert account["paceline"]["headline"].startswith("Bad: <")
    assert account["paceline"]["where"] == f"{tmp_path / 'script.py'}:4"


def test_a_syntax_error(tmp_path: Path) -> None:
    done, account = run(tmp_path, "script.py", source="def f(:\n")
    assert (done.returncode, done.stderr) == (1, "")
    assert account is not None
    assert "script.py" in account["paceline"]["traceback"]
    assert account["paceline"]["headline"].startswith("SyntaxError")


@pytest.mark.parametrize(
    ("statement", "code", "stderr"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no data')", 1, "no data\n"),
        ("sys.exit()", 0, ""),
        ("raise SystemExit(0)", 0, ""),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_exit_codes(tmp_path: Path, statement: str, code: int, stderr: str) -> None:
    done, account = run(tmp_path, "script.py", source=f"import sys\n{statement}\n")
    assert (done.returncode, done.stderr) == (code, stderr)
    assert (account is None) == (code == 0)
    if account is not None:
        assert account["paceline"]["where"].endswith("script.py:2")


@pytest.mark.parametrize(
    ("statement", "said"), [("sys.exit(75)", ""), ("sys.exit('no data')", "no data\n"), ("1 / 0", "Traceback")]
)
def test_under_another_launcher_the_rank_tells_its_failure_itself(tmp_path: Path, statement: str, said: str) -> None:
    (tmp_path / "script.py").write_text(f"import sys\n{statement}\n")
    command = [sys.executable, "-m", "paceline.launch.worker", "script.py"]
    env = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_ERROR_FILE"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode in (1, 75)
    assert done.stderr == said or (done.stderr.startswith(said or "nothing") and done.stderr.endswith("by zero\n"))


@pytest.mark.parametrize(
    ("text", "secondary"),
    [
        ("RuntimeError('[pair.cc:5] Connection closed by peer [127.0.0.1]')", True),
        ("RuntimeError('Connection reset by peer')", True),
        ("type('DistBackendError', (RuntimeError,), {})('NCCL error')", True),
        ("RuntimeError('shapes differ')", False),
    ],
)
def test_errors_that_another_rank_caused(tmp_path: Path, text: str, secondary: bool) -> None:
    _, account = run(tmp_path, "script.py", source=f"raise {text}")
    assert account is not None
    assert account["paceline"]["secondary"] is secondary


def test_the_cause_of_an_error_counts(tmp_path: Path) -> None:
    source = """
    try:
        raise RuntimeError("Connection closed by peer")
    except RuntimeError as error:
        raise ValueError("no answer") from error
    """
    _, account = run(tmp_path, "script.py", source=source)
    assert account is not None
    assert account["paceline"]["secondary"] is True


def test_a_hook_of_the_script_hears_of_the_crash(tmp_path: Path) -> None:
    source = """
    import sys
    def hook(kind, error, trace):
        print("hook saw", kind.__name__)
        print("noise", file=sys.stderr)
    sys.excepthook = hook
    1 / 0
    """
    done, _ = run(tmp_path, "script.py", source=source)
    assert (done.stdout, done.stderr) == ("hook saw ZeroDivisionError\n", "")


def test_a_program_replaces_the_worker(tmp_path: Path) -> None:
    done, account = run(tmp_path, "--program", "sh", "-c", "echo $RANK; exit 5")
    assert (done.stdout, done.returncode, account) == ("1\n", 5, None)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_a_worker_whose_launcher_is_gone_does_not_start(tmp_path: Path) -> None:
    done, _ = run(tmp_path, "--parent", "1", "script.py", source="print('ran')")
    assert (done.stdout, done.returncode) == ("", 137)
