"""`paceline estimate`."""

from __future__ import annotations

import json
import re
import shlex
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner

from paceline.cli.estimate import Device, command
from paceline.errors import UsageError
from paceline.planner.estimation import Layout, RankMemory

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.cli.conftest import Paceline

MODEL = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))

def batch(samples):
    return (torch.zeros(samples, 32),)

class Depends(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 8)
    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x

def number():
    return 3

def takes(width):
    return nn.Linear(width, width)

def reads():
    layer = nn.Linear(4, 4)
    layer.weight.abs().max().item()
    return layer

def nothing_inside():
    return nn.ReLU()

def frozen():
    return build().requires_grad_(False)
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    file = tmp_path / "own_model_of_estimate.py"
    file.write_text(MODEL)
    return str(file)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(command, list(arguments), catch_exceptions=False)


def test_a_model_of_a_script(script: str) -> None:
    done = run(f"{script}:build", "--inputs", f"{script}:batch", "--batch_size", "4", "--memory", "1100MiB")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "Sequential: 2.632 thousand parameters; batch 4"
    assert any(line.startswith("FSDP2") for line in lines)
    assert "2 ranks: DDP" in done.stdout
    assert re.search(r"1 rank: .*; it is full with batches of \d+ for each rank", done.stdout)


def test_a_limit_of_the_search_is_not_a_result(script: str) -> None:
    arguments = (f"{script}:build", "--inputs", f"{script}:batch", "--memory", "8000GiB", "--num_processes", "2")
    assert "DDP, " in (said := run(*arguments).stdout)
    assert "it is full" not in said
    assert "batches of more than 1,000,000 for each rank fit too" in said
    found = json.loads(run(*arguments, "--json").stdout)["least_sharding"]["2"]
    assert (found["largest_batch"], found["is_lower_bound"]) == (1 << 20, True)


def test_the_command_that_is_recommended_works_without_a_gpu(script: str, paceline: Paceline) -> None:
    said = run(f"{script}:build", "--num_processes", "1,2").stdout
    recommended = [line.partition("   paceline launch ")[2] for line in said.splitlines() if "paceline launch" in line]
    assert len(recommended) == 2
    for flags in recommended:
        answer = paceline("launch", "--cpu", "--dry_run", *shlex.split(flags), script)
        assert answer.code == 0, answer.err


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the memory of this machine is that of its devices")
def test_the_ranks_of_a_machine_without_a_gpu_share_its_memory(script: str) -> None:
    arguments = (f"{script}:build", "--inputs", f"{script}:batch", "--num_processes", "1,2,8")
    memory = json.loads(run(*arguments, "--json").stdout)["memory"]
    assert memory["usable"] == {str(ranks): memory["total"] // ranks for ranks in (1, 2, 8)}
    assert "whose memory the ranks share" in run(*arguments).stdout


def test_shared_memory_holds_what_is_offloaded_too() -> None:
    layout = Layout(name="any", strategy="fsdp", offload=True)
    row = RankMemory(layout=layout, num_processes=2, batch=1, peak=5, host=7)
    host, device = Device(100, "cpu", is_host=True), Device(2**40, "GPU")
    assert (host.usable(4), host.need(row)) == (25, 12)
    assert device.usable(4) == device.usable(1)
    assert device.need(row) == 5


def test_no_library_of_gpus_is_named_where_nothing_fits(script: str) -> None:
    said = run(f"{script}:build", "--memory", "1GiB", "--num_processes", "1").stdout
    assert "1 rank: none; nothing is left" in said
    assert "NCCL" not in said


def test_json(script: str) -> None:
    found = json.loads(run(f"{script}:build", "--json", "--num-processes", "1,4", "--mixed_precision", "no").stdout)
    elements = 32 * 64 + 64 + 64 * 8 + 8
    single = found["training"]["1"][0]
    assert (single["layout"], single["weights"], single["gradients"]) == ("single", 4 * elements, 4 * elements)
    assert single["optimizer"] == 8 * elements
    assert found["includes_activations"] is False
    assert set(found["training"]) == {"1", "4"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("{}:missing",), "cannot be imported"),
        (("{}:buld",), r"cannot be imported: .*did you mean build\?"),
        (("{}:number",), "is of type int"),
        (("{}:takes",), "needs arguments: width"),
        (("{}:reads",), r"\.item\(\).*meta device.*Leave out"),
        (("{}:nothing_inside",), "without parameters and buffers"),
        (("{}:frozen", "--inputs", "{}:batch"), "weights that require gradients"),
        (("{}",), r"It defines build, batch.*Write, for example"),
        (("nothing",), "cannot be found.*Hub are not looked up"),
        (("{}:build", "--inputs", "nothing"), "cannot be found"),
        (("{}:build", "--inputs", "{}:build"), "cannot be called with a number of samples"),
        (("{}:build", "--optimizer", "adam"), "adamw, adamw_fused, sgd.*torch.optim:Adagrad"),
        (("{}:Depends", "--inputs", "{}:batch"), "cannot be traced"),
    ],
)
def test_what_cannot_be_estimated(script: str, arguments: tuple[str, ...], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        run(*(each.format(script) for each in arguments))


@pytest.mark.parametrize(
    "arguments", [("--memory", "much"), ("--memory", "1.2.3GiB"), ("--num_processes", "0"), ("--num_processes", "a,b")]
)
def test_wrong_values(script: str, arguments: tuple[str, ...]) -> None:
    assert run(f"{script}:build", *arguments).exit_code == 2


def test_a_configuration_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    done = run(str(tmp_path), "--sequence_length", "16", "--json", "--memory", "2GB")
    found = json.loads(done.stdout)
    assert found["model"] == "LlamaForCausalLM"
    assert found["samples"] == "sequences of 16 tokens"
    assert all(row["activations"] for row in found["training"]["8"])
