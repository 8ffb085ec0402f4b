"""`paceline estimate`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from paceline.cli.estimate import command
from paceline.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

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
    done = run(f"{script}:build", "--inputs", f"{script}:batch", "--batch_size", "4", "--memory", "2GiB")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Sequential: 0.000 billion parameters; batch 4")
    assert any(line.startswith("FSDP2") for line in lines)
    assert "2 ranks: DDP" in done.stdout
    assert "it is full with batches of" in done.stdout


def test_json(script: str) -> None:
    found = json.loads(run(f"{script}:build", "--json", "--num-processes", "1,4", "--mixed_precision", "no").stdout)
    elements = 32 * 64 + 64 + 64 * 8 + 8
    single = found["training"]["1"][0]
    assert (single["layout"], single["weights"], single["gradients"]) == ("single", 4 * elements, 4 * elements)
    assert single["optimizer"] == 8 * elements
    assert found["includes_activations"] is False
    assert set(found["training"]) == {"1", "4"}


def test_nothing_fits(script: str) -> None:
    assert "1 rank: none; nothing is left" in run(f"{script}:build", "--memory", "1KiB", "--num_processes", "1").stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("{}:missing",), "cannot be imported"),
        (("{}:number",), "is of type int"),
        (("{}:takes",), "needs arguments: width"),
        (("{}:reads",), r"\.item\(\).*meta device.*Leave out"),
        (("{}:nothing_inside",), "without parameters and buffers"),
        (("{}:frozen", "--inputs", "{}:batch"), "weights that require gradients"),
        (("{}",), r"It defines build, batch.*Write, for example"),
        (("nothing",), "cannot be found.*Hub are not looked up"),
        (("{}:build", "--inputs", "nothing"), "cannot be found"),
        (("{}:build", "--optimizer", "adam"), "adamw, adamw_fused, sgd.*torch.optim:Adagrad"),
        (("{}:Depends", "--inputs", "{}:batch"), "cannot be traced"),
    ],
)
def test_what_cannot_be_estimated(script: str, arguments: tuple[str, ...], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        run(*(each.format(script) for each in arguments))


@pytest.mark.parametrize("arguments", [("--memory", "much"), ("--num_processes", "0"), ("--num_processes", "a,b")])
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
