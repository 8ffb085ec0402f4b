"""Importing the twin costs next to nothing, and its names come on first use."""

from __future__ import annotations

import json
import subprocess
import sys

# `import accelerate` adds about 80 modules to torch's.
_MOST_MODULES = 20
_PROGRAM = """
import json, sys
import torch
before = set(sys.modules)
import paceline.compat.accelerate as accelerate
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def _run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_the_import_adds_few_modules() -> None:
    added = json.loads(_run(_PROGRAM))
    assert len(added) <= _MOST_MODULES
    assert all(name.startswith("paceline") for name in added)


def test_an_accelerator_through_the_switch_imports_little() -> None:
    """Seconds depend on the machine; the modules that are read do not."""
    program = """
import json, sys
import torch, torch.distributed
before = set(sys.modules)
from paceline.compat import install_as_accelerate
install_as_accelerate()
from accelerate import Accelerator
Accelerator(cpu=True)
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    added = json.loads(_run(program).splitlines()[-1])
    own = [name for name in added if name.startswith("paceline")]
    assert len(own) <= 150, len(own)
    unused = ("checkpoint.catalog", "data.prepare", "planner", "tracking.wandb", "trainer", "launch", "cli")
    assert not [name for name in own if name.removeprefix("paceline.").startswith(unused)]
    foreign = {name.partition(".")[0] for name in added} - {"paceline", "accelerate"} - set(sys.stdlib_module_names)
    of_schema = {"annotated_types", "pydantic", "pydantic_core", "typing_extensions", "typing_inspection"}
    assert {name for name in foreign if not name.startswith("_")} <= of_schema | {"packaging"}


def test_names_states_and_operations_need_no_client_and_no_schema() -> None:
    program = """
import sys
import paceline.compat.accelerate as accelerate
accelerate.Accelerator
accelerate.PartialState(cpu=True)
accelerate.utils.gather, accelerate.DataLoaderConfiguration(), accelerate.DeepSpeedPlugin
accelerate.utils.is_deepspeed_available()
print([name for name in ("pydantic", "deepspeed", "transformers", "yaml") if name in sys.modules])
"""
    assert _run(program).strip() == "[]"


def test_a_module_and_its_function_may_have_one_name() -> None:
    program = """
import paceline.compat.accelerate.utils.tqdm
from paceline.compat.accelerate.utils import tqdm
import paceline.compat.accelerate as accelerate
print(callable(tqdm), accelerate.hooks.AlignDevicesHook.__name__, accelerate.utils.memory.release_memory.__name__)
"""
    assert _run(program).split() == ["True", "AlignDevicesHook", "release_memory"]


def test_a_bar_is_hidden_where_it_is_not_wanted() -> None:
    program = """
from paceline.compat.accelerate.utils import tqdm
from paceline.compat.accelerate.state import PartialState
print(tqdm(range(2)).disable, tqdm(range(2), disable=True).disable)
PartialState().local_process_index = 1
print(tqdm(range(2)).disable, tqdm(range(2), main_process_only=False).disable)
"""
    assert _run(program).split() == ["False", "True", "True", "False"]
