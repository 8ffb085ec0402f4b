"""Functions on ranks: from a program, and from a cell of a real Jupyter kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paceline import Accelerator, debug_launcher, notebook_launcher
from paceline.errors import ConfigError
from paceline.launch.notebook import launchers
from tests.support.ranks import free_port

PROGRAM = """
import json, os, sys, threading
import torch
from paceline import debug_launcher, notebook_launcher

class Found:
    def __init__(self, rank):
        self.rank = rank

def helper(accelerator):
    return Found(accelerator.process_index)

def train(scale):
    from paceline import Accelerator
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    print("from", accelerator.process_index)
    return helper(accelerator), accelerator.reduce(torch.ones(2), "sum").tolist()

def fail():
    from paceline import Accelerator
    if os.environ["RANK"] == "1":
        raise KeyError("no such thing")
    Accelerator(cpu=True).wait_for_everyone()

def told(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

lock = threading.Lock()
def locked():
    return lock

before = dict(os.environ)
results = debug_launcher(train, (3,))
print(json.dumps({
    "results": [(type(found) is Found, found.rank, value) for found, value in results],
    "failed": told(lambda: notebook_launcher(fail, num_processes=2, log_line_prefix_template="[${rank}] ")),
    "locked": told(lambda: debug_launcher(locked)),
    "environment": before == dict(os.environ),
}))
"""


@pytest.mark.slow
def test_a_function_of_main_on_ranks(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True)
    *printed, last = done.stdout.splitlines()
    told = json.loads(last)
    assert {"from 0", "from 1"} <= set(printed), printed
    assert told["results"] == [[True, 0, [2.0, 2.0]], [True, 1, [2.0, 2.0]]]
    assert told["failed"].startswith("WorkerError: rank 0: ")
    assert told["failed"].endswith("raise KeyError(\"no such thing\")\nKeyError: 'no such thing'\n"), told["failed"]
    assert "the variable 'lock' (lock) of locked() cannot be sent" in told["locked"]
    assert told["environment"]


def test_one_process_is_the_caller() -> None:
    def train(wanted: str) -> tuple[int, str]:
        accelerator = Accelerator(cpu=True)
        assert accelerator.mixed_precision == wanted
        return os.getpid(), accelerator.mixed_precision

    assert notebook_launcher(train, ("bf16",), num_processes=1, mixed_precision="bf16") == [(os.getpid(), "bf16")]
    assert debug_launcher(train, ("no",), num_processes=1) == [(os.getpid(), "no")]
    with pytest.raises(ZeroDivisionError):
        notebook_launcher(lambda: 1 / 0, num_processes=1)
    assert Accelerator(cpu=True).mixed_precision == "no"


CELLS = [
    """
import os, signal, sys, tempfile, threading, time, torch
from paceline import notebook_launcher
class Net(torch.nn.Linear):
    pass
def train(scale):
    from paceline import Accelerator
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(Net(2, 2))
    print("hello from", accelerator.process_index)
    print("warned", file=sys.stderr)
    return scale * accelerator.process_index
""",
    "notebook_launcher(train, (3,), num_processes=2)",
    """
def fail():
    raise ValueError("no such thing")
notebook_launcher(fail, num_processes=2)
""",
    """
folder = tempfile.TemporaryDirectory()
def sleep(folder):
    print("asleep", flush=True)
    open(f"{folder}/{os.environ['RANK']}", "w").close()
    time.sleep(1000)
def interrupt():
    while len(os.listdir(folder.name)) < 2:
        time.sleep(0.1)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    notebook_launcher(sleep, (folder.name,), num_processes=2, log_line_prefix_template="[${rank}] ")
except KeyboardInterrupt as stop:
    print("stopped:", stop)
folder.cleanup()
""",
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_cells_of_a_jupyter_kernel() -> None:
    nbformat: Any = pytest.importorskip("nbformat", reason="needs nbformat, nbclient and ipykernel")
    nbclient: Any = pytest.importorskip("nbclient", reason="needs nbformat, nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="needs nbformat, nbclient and ipykernel")
    source = str(Path(__file__).parents[2] / "src")
    first = f"import sys\nsys.path.insert(0, {source!r})\n{CELLS[0]}"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in (first, *CELLS[1:])])
    nbclient.NotebookClient(notebook, timeout=800, allow_errors=True, kernel_name="python3").execute()
    _, fine, failed, stopped = [cell.outputs for cell in notebook.cells]
    assert _text(fine, "stdout") == ["hello from 0", "hello from 1"]
    assert _text(fine, "stderr") == ["warned", "warned"]
    assert [o["data"]["text/plain"] for o in fine if o.output_type == "execute_result"] == ["[0, 3]"]
    [error] = [o for o in failed if o.output_type == "error"]
    assert error.ename == "WorkerError"
    assert 'raise ValueError("no such thing")\nValueError: no such thing' in error.evalue
    assert _text(stopped, "stdout") == ["[0] asleep", "[1] asleep", "stopped: all ranks have exited"]


def _text(outputs: list[Any], name: str) -> list[str]:
    whole = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == name)
    return sorted(line for line in whole.splitlines() if line)


@pytest.mark.parametrize(
    ("arguments", "address", "port"),
    [
        ({"rdzv_endpoint": "head:29501"}, "head", 29501),
        ({"rdzv_endpoint": "[fe80::1]:29501"}, "[fe80::1]", 29501),
        ({"rdzv_endpoint": "head", "use_port": "29501"}, "head", 29501),
        ({"master_addr": "head", "use_port": 0}, "head", None),
    ],
)
def test_where_machines_meet(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], address: str, port: int | None
) -> None:
    monkeypatch.setattr(launchers, "_launch", lambda function, args, resolved, template: [resolved.config])
    (config,) = notebook_launcher(print, num_processes=2, num_nodes=2, **arguments)
    assert (config.main_process_ip, config.main_process_port) == (address, port)


def test_a_port_that_is_no_number_is_named() -> None:
    with pytest.raises(ConfigError, match="main_process_port: the text 'abc' is not allowed"):
        notebook_launcher(print, num_processes=2, num_nodes=2, rdzv_endpoint="head:abc")


TWO_MACHINES = """
import sys
from paceline import notebook_launcher

def train():
    from paceline import Accelerator
    accelerator = Accelerator(cpu=True)
    return accelerator.process_index, sum(accelerator.gather_object([1]))

machine, port = map(int, sys.argv[1:])
print(notebook_launcher(train, num_processes=2, num_nodes=2, node_rank=machine, master_addr="127.0.0.1", use_port=port))
"""


@pytest.mark.slow
def test_two_machines_each_get_the_values_of_their_ranks(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(TWO_MACHINES)
    port = str(free_port())
    running = [
        subprocess.Popen([sys.executable, str(program), machine, port], stdout=subprocess.PIPE, text=True)
        for machine in "01"
    ]
    said = [process.communicate(timeout=800)[0].splitlines()[-1] for process in running]
    assert said == ["[(0, 4), (1, 4)]", "[(2, 4), (3, 4)]"]
