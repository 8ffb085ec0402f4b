"""From the configuration to DeepSpeed's dictionary, without DeepSpeed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from paceline import DeepSpeedPlugin, DummyOptim, DummyScheduler
from paceline.config import RunConfig
from paceline.errors import ConfigError
from paceline.strategies.deepspeed.settings import AutoValues, hidden_size_of, resolve_scheduler, resolve_settings

MODEL = nn.Linear(2, 2)


def settings(
    described: dict[str, Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    run: dict[str, Any] | None = None,
    plugin: dict[str, Any] | None = None,
    **known: Any,
) -> dict[str, Any]:
    given: dict[str, Any] = {"world_size": 2, "micro_batch": 4, "hidden_size": 10, "on_cpu": True, **known}
    given["optimizer"] = optimizer or torch.optim.AdamW(MODEL.parameters())
    # As it comes out of resolving: the stage of the JSON is the plugin's.
    stage = 3 if described is None else described["zero_optimization"]["stage"]
    made = DeepSpeedPlugin(hf_ds_config=described, zero_stage=stage, **(plugin or {}))
    return resolve_settings(made, RunConfig(**(run or {})), AutoValues(**given))


def test_without_a_json_the_run_says_all() -> None:
    found = settings(run={"gradient_accumulation_steps": 3, "mixed_precision": "bf16"})
    assert found["zero_optimization"] == {"stage": 3}
    assert found["train_micro_batch_size_per_gpu"] == 4
    assert found["gradient_accumulation_steps"] == 3
    assert found["train_batch_size"] == 24
    assert found["bf16"] == {"enabled": True}
    assert "fp16" not in found
    assert "gradient_clipping" not in found, "the script clips"


def test_a_batch_of_unknown_size_counts_as_one() -> None:
    assert settings(micro_batch=None)["train_batch_size"] == 2


AUTO = {
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    }
}


def test_buckets_follow_the_width_of_the_model() -> None:
    assert settings(AUTO)["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 100,
        "stage3_prefetch_bucket_size": 90,
        "stage3_param_persistence_threshold": 100,
    }
    assert settings(AUTO, hidden_size=None)["zero_optimization"] == {"stage": 3}, "DeepSpeed's defaults hold"


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (SimpleNamespace(hidden_size=8), 8),
        (SimpleNamespace(hidden_sizes=[4, 16, 8]), 16),
        (SimpleNamespace(text_config=SimpleNamespace(hidden_size=32)), 32),
        (SimpleNamespace(text_config=SimpleNamespace(hidden_sizes=[2, 3])), 3),
        (SimpleNamespace(), None),
        (None, None),
    ],
)
def test_the_width_of_a_model(config: Any, wanted: int | None) -> None:
    model = nn.Linear(1, 1)
    if config is not None:
        model.config = config
    assert hidden_size_of(model) == wanted


@pytest.mark.parametrize(("on_cpu", "pins"), [(True, False), (False, True)])
def test_memory_is_pinned_where_a_device_gains_by_it(on_cpu: bool, pins: bool) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    found = settings({"zero_optimization": zero}, on_cpu=on_cpu)["zero_optimization"]
    assert found["offload_optimizer"] == {"device": "cpu", "pin_memory": pins}
    assert "offload_param" not in found


def test_what_only_the_placeholder_sets_is_added() -> None:
    described = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "SGD"}}
    found = settings(described, DummyOptim(MODEL.parameters(), lr=0.5, momentum=0.9))
    assert found["optimizer"]["params"] == {"lr": 0.5, "momentum": 0.9}


def test_a_placeholder_completes_its_section() -> None:
    described = {
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    }
    placeholder = DummyOptim(MODEL.parameters(), lr=0.5, betas=(0.8, 0.9))
    found = settings(described, placeholder)["optimizer"]["params"]
    assert found == {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.0}
    assert described["optimizer"]["params"]["lr"] == "auto", "what the user wrote stays"  # type: ignore[index]


@pytest.mark.parametrize(
    ("described", "optimizer", "said"),
    [
        ({"train_micro_batch_size_per_gpu": 3}, None, "3 contradicts the run; the prepared loader gives"),
        ({"train_batch_size": 9}, None, "9 contradicts the run; 2 ranks x 1 micro-batches x 4 samples make 8"),
        ({"optimizer": {"type": "Adam"}}, None, "Adam is described, and the script has an optimizer AdamW"),
        ({}, DummyOptim(MODEL.parameters()), "optimizer: is missing"),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": 0.1}}},
            DummyOptim(MODEL.parameters(), lr=0.2),
            "0.1 contradicts DummyOptim(lr=0.2)",
        ),
        (
            {"zero_optimization": {"stage": 2, "sub_group_size": "auto"}},
            None,
            'sub_group_size: cannot resolve "auto"',
        ),
        ({"optimizer": {"type": "AdmW"}}, DummyOptim(MODEL.parameters()), "neither DeepSpeed nor torch has it"),
        ({"optimizer": {"params": {}}}, DummyOptim(MODEL.parameters()), "None is unknown"),
        (
            {"optimizer": {"type": "adam", "params": {"learning_rate": 1, "adam_w_mode": True}}},
            DummyOptim(MODEL.parameters()),
            "params.learning_rate: adam has no such argument",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1}}},
            DummyOptim(MODEL.parameters()),
            "write gradient_clipping",
        ),
    ],
)
def test_contradictions_are_named(described: dict[str, Any], optimizer: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings({"zero_optimization": {"stage": 2}} | described, optimizer)
    assert said in str(error.value)
    assert len(error.value.problems) == 1


def test_all_contradictions_are_named_at_once() -> None:
    described = {"zero_optimization": {"stage": 2, "sub_group_size": "auto"}, "train_batch_size": 9, "optimizer": {}}
    with pytest.raises(ConfigError) as error:
        settings(described)
    assert len(error.value.problems) == 3


def test_a_schedule_of_the_same_call_is_looked_at_with_the_rest() -> None:
    described = {
        "zero_optimization": {"stage": 2},
        "train_batch_size": 9,
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 3}},
    }
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.25)
    with pytest.raises(ConfigError) as error:
        settings(described, optimizer, schedule=DummyScheduler(optimizer, total_num_steps=4))
    assert [p.key for p in error.value.problems] == ["train_batch_size", "scheduler.params.total_num_steps"]


def test_sections_that_are_empty_or_auto_follow_the_run() -> None:
    described = {"zero_optimization": {"stage": 2}, "bf16": "auto", "fp16": None, "scheduler": None}
    found = settings(described, run={"mixed_precision": "bf16"})
    assert found["bf16"] == {"enabled": True}
    assert found.keys().isdisjoint({"fp16", "scheduler"})


# The schedule


def schedule(parameters: dict[str, Any], **said: Any) -> dict[str, Any]:
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.25)
    section = {"type": "WarmupDecayLR", "params": parameters}
    resolved = resolve_scheduler({"scheduler": section}, DummyScheduler(optimizer, **said), optimizer)
    found: dict[str, Any] = resolved["params"]
    return found


def test_a_schedule_is_resolved_from_its_placeholder() -> None:
    keys = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps", "warmup_type")
    found = schedule(dict.fromkeys(keys, "auto"), total_num_steps=9, warmup_type="linear")
    assert found == dict(zip(keys, (0, 0.25, 1, 9, "linear"), strict=True))
    assert schedule({"warmup_num_steps": 5}) == {"warmup_num_steps": 5, "warmup_max_lr": 0.25}


def test_a_schedule_takes_what_its_section_leaves_out() -> None:
    found = schedule({}, total_num_steps=9, warmup_num_steps=2)
    assert found == {"total_num_steps": 9, "warmup_num_steps": 2, "warmup_max_lr": 0.25}


def test_groups_keep_their_own_rates_in_a_schedule() -> None:
    groups: list[dict[str, Any]] = [{"params": [MODEL.weight], "lr": 0.5}, {"params": [MODEL.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.25)
    section = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}
    found = resolve_scheduler({"scheduler": section}, DummyScheduler(optimizer), optimizer)
    assert found["params"]["warmup_max_lr"] == [0.5, 0.25]


def test_a_schedule_that_contradicts_its_placeholder_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        schedule({"total_num_steps": 3, "warmup_num_steps": 1, "warmup_max_lr": 0.5}, total_num_steps=9)
    found = [str(problem) for problem in error.value.problems]
    assert len(found) == 2, found
    assert "3 contradicts 9, DummyScheduler(total_num_steps=…)" in found[0]
    assert "0.5 contradicts 0.25, the optimizer's rate" in found[1]


def test_each_schedule_value_without_a_source_has_its_own_hint() -> None:
    with pytest.raises(ConfigError) as error:
        schedule({"warmup_type": "auto", "last_batch_iteration": "auto"})
    assert [f"(optimizer, {p.key.rpartition('.')[2]}=…)" in p.hint for p in error.value.problems] == [True, True]


def test_a_schedule_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"scheduler.params.total_num_steps: .*pass DummyScheduler\(optimizer, total"):
        schedule({"total_num_steps": "auto"})
