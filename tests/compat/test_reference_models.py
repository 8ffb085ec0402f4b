"""`fsdp2_prepare_model`: models without an optimizer, sharded as programs do with their reference models."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from paceline.compat.accelerate.settings.errors import InvalidValueError
from paceline.compat.accelerate.utils.dataclasses import FullyShardedDataParallelPlugin
from paceline.compat.accelerate.utils.fsdp_utils import (
    fsdp2_prepare_auto_wrap_policy,
    fsdp2_prepare_model,
    rebind,
)
from tests.compat.test_accelerator import build, on_ranks


class Block(nn.Module):
    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        return torch.tanh(self.linear(x)) + self.shift


class Net(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.blocks(x))


def made() -> Net:
    torch.manual_seed(2)
    return Net()


INPUT = torch.linspace(-1, 1, 12).view(3, 4)


def sharded(efficient: bool) -> tuple[list[list[float]], list[str], list[int]]:
    accelerator = build("fsdp")
    plugin = accelerator.state.fsdp_plugin
    plugin.cpu_ram_efficient_loading = efficient
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    model = made()
    if efficient and not accelerator.is_main_process:
        # As transformers does there: only rank 0 has read the file.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    prepared = fsdp2_prepare_model(accelerator, model)
    assert prepared is model
    assert fsdp2_prepare_model(accelerator, model) is model
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    local = [cast("DTensor", parameter).to_local().numel() for parameter in model.head.parameters()]
    with torch.no_grad():
        return model(INPUT).tolist(), units, local


@pytest.mark.parametrize("efficient", [False, True])
def test_a_reference_model_is_sharded_and_computes_what_it_did(efficient: bool) -> None:
    with torch.no_grad():
        expected = made()(INPUT)
    for outputs, units, local in on_ranks(2, sharded, efficient):
        torch.testing.assert_close(torch.tensor(outputs), expected)
        assert units == ["", "blocks.0", "blocks.1"]
        assert local == [4, 1]


def in_bf16() -> set[torch.dtype]:
    accelerator = build("fsdp", mixed_precision="bf16")
    model = made().to(torch.bfloat16)
    model.head.requires_grad_(False)
    frozen = model.head.to(torch.float32)
    fsdp2_prepare_model(accelerator, model)
    assert frozen.weight.dtype == torch.float32
    return {parameter.dtype for parameter in model.blocks.parameters()}


def test_what_is_trained_is_held_in_fp32() -> None:
    assert on_ranks(2, in_bf16) == [{torch.float32}] * 2


def trained_apart() -> tuple[list[list[float]], list[str]]:
    """Shard by the private step of Accelerate's `prepare`, as some programs do, and train."""
    accelerator = build("fsdp")
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator._prepare_fsdp2(model, optimizer)
    for _ in range(3):
        model(INPUT).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model(INPUT).tolist(), list(accelerator._get_named_parameters(model))


def test_an_optimizer_follows_its_model_into_shards() -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(INPUT).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        expected = model(INPUT)
    for outputs, names in on_ranks(2, trained_apart):
        torch.testing.assert_close(torch.tensor(outputs), expected)
        assert names == [name for name, _ in model.named_parameters()]


def test_a_parameter_that_is_lost_is_an_error() -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = dict(model.named_parameters())
    after = {name: parameter for name, parameter in before.items() if name != "head.bias"}
    with pytest.raises(KeyError, match=r"^Parameters missing after FSDP2 wrapping: head\.bias\. "):
        rebind(optimizer, before, after, model)
    config = SimpleNamespace(tie_word_embeddings=True)
    tied: Any = SimpleNamespace(config=config, _tied_weights_keys=["head.bias"])
    with pytest.raises(ValueError, match=r"has lost head\.bias.* tied embeddings"):
        rebind(optimizer, before, after, tied)


def units_of(policy: Any, **arguments: Any) -> list[str]:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=policy, **arguments)
    model = made()
    plugin.set_auto_wrap_policy(model)
    is_unit = fsdp2_prepare_auto_wrap_policy(plugin, model)
    return [] if is_unit is None else [name for name, module in model.named_modules() if is_unit(module)]


def heads(module: nn.Module, recurse: bool, nonwrapped_numel: int, *, least: int) -> bool:
    return recurse or (isinstance(module, nn.Linear) and nonwrapped_numel <= least)


def test_what_a_unit_is() -> None:
    assert units_of("TRANSFORMER_BASED_WRAP") == ["blocks.0", "blocks.1"]
    assert units_of("SIZE_BASED_WRAP", min_num_params=21) == ["", "blocks"]
    assert units_of("NO_WRAP") == []
    assert units_of(functools.partial(heads, least=10)) == ["head"]


def test_a_plugin_for_version_1_is_an_error() -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    run = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(InvalidValueError, match="version 1 of FSDP"):
        fsdp2_prepare_model(run, made())
