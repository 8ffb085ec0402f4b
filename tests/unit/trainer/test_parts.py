"""Schedules, optimizers, samplers and collators by themselves."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paceline import TrainingArguments
from paceline.errors import ConfigError, MissingExtraError
from paceline.trainer.batches.collate import Columns, columns_of, default_collator
from paceline.trainer.batches.sampling import LengthGroupedSampler
from paceline.trainer.optim.optimizers import decaying_names, optimizer_class, parameter_groups
from paceline.trainer.optim.schedules import SCHEDULES, make_schedule
from tests.support.ranks import run_on_ranks
from tests.support.trainer import Tagger, run

CPU = torch.device("cpu")
# Of each schedule, its defaults where it has them, and options.
CASES: list[tuple[str, dict[str, Any]]] = [
    *(
        (name, {})
        for name in SCHEDULES
        if "min_lr" not in name and name not in ("reduce_lr_on_plateau", "warmup_stable_decay")
    ),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 1e-4}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.2, "num_cycles": 1.0}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-4}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2}),
    ("polynomial", {"power": 2.0, "lr_end": 1e-5}),
    ("inverse_sqrt", {"timescale": 7}),
    ("warmup_stable_decay", {"num_decay_steps": 12}),
    ("warmup_stable_decay", {"num_decay_steps": 4, "num_stable_steps": 5}),
    ("warmup_stable_decay", {"num_decay_steps": 12, "min_lr_ratio": 0.1, "decay_type": "linear"}),
    ("warmup_stable_decay", {"num_decay_steps": 12, "warmup_type": "cosine", "decay_type": "1-sqrt"}),
]
WARMUPS = (0, 1, 6)


def rates(schedule: Any, optimizer: Any) -> list[float]:
    found = []
    for _ in range(45):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return found


def both_courses() -> dict[str, tuple[list[float], list[float]]]:
    from transformers import get_scheduler

    found = {}
    for warmup, (name, more) in itertools.product(WARMUPS, CASES):
        mine, theirs = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2) for _ in range(2))
        own = make_schedule(name, mine, warmup=warmup, total=40, arguments=more)
        other = get_scheduler(name, theirs, warmup, 40, scheduler_specific_kwargs=dict(more))
        found[f"{name} {more} after {warmup} steps"] = (rates(own, mine), rates(other, theirs))
    return found


def test_every_schedule_is_the_one_that_transformers_means() -> None:
    pytest.importorskip("transformers", reason="pip install 'paceline[transformers]'")
    found = run_on_ranks(1, both_courses)[0]
    assert len(found) == len(WARMUPS) * len(CASES)
    for name, (mine, theirs) in found.items():
        assert mine == pytest.approx(theirs, abs=1e-12), name


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("cosine", {"num_cycle": 2}, "did you mean num_cycles?"),
        ("linear", {"power": 2}, "linear takes none"),
        ("cosine_with_min_lr", {}, "neither min_lr nor min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 0.1, "min_lr_rate": 0.1}, "both set the final rate"),
        ("warmup_stable_decay", {}, "num_decay_steps: is missing"),
        ("reduce_lr_on_plateau", {"patince": 2}, "did you mean patience?"),
        ("polynomial", {"peak": 2.0}, "polynomial takes lr_end, power"),
        # These would fail only once the decay begins, or at its end.
        ("warmup_stable_decay", {"num_decay_steps": 1, "decay_type": "cosin"}, "did you mean cosine?"),
        ("warmup_stable_decay", {"num_decay_steps": 1, "warmup_type": 1}, "1 is not a decay shape"),
        ("cosine", {"num_cycles": "0.5"}, "'0.5' is not a number"),
        ("polynomial", {"power": -1}, "it must be at least 0"),
        ("inverse_sqrt", {"timescale": 0}, "the step is divided by it"),
        ("inverse_sqrt", {"timescale": -2}, "it must be at least 0"),
        ("cosine_with_min_lr", {"min_lr": float("nan")}, "nan is not a number"),
        # A decay that would be a rise, and one that does not fit.
        ("cosine_with_min_lr", {"min_lr": 2.0}, "2.0 with a peak learning rate of 1"),
        ("cosine_with_min_lr", {"min_lr_rate": 2.0}, "a fraction of the peak rate"),
        ("polynomial", {"lr_end": 2.0}, "2.0 with a peak learning rate of 1"),
        ("warmup_stable_decay", {"num_decay_steps": 4}, "give at most 3"),
    ],
)
def test_arguments_that_a_schedule_does_not_have(name: str, more: dict[str, Any], said: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        make_schedule(name, optimizer, warmup=0, total=3, arguments=more)


@pytest.mark.parametrize(("name", "more"), CASES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 0), (0, 1), (3, 3), (1, 12), (20, 15)])
def test_every_schedule_gives_a_rate_at_every_step(name: str, more: dict[str, Any], warmup: int, total: int) -> None:
    if name == "warmup_stable_decay":
        more = {key: value for key, value in more.items() if key != "num_stable_steps"}
        more["num_decay_steps"] = max(0, total - warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = make_schedule(name, optimizer, warmup=warmup, total=total, arguments=more)
    assert all(0 <= rate <= 0.5 for rate in rates(schedule, optimizer))


@pytest.mark.parametrize(("name", "more"), CASES)
def test_a_learning_rate_of_0_stays_0(name: str, more: dict[str, Any]) -> None:
    # A final rate cannot be above the peak.
    more = {key: 0.0 if key in ("min_lr", "lr_end") else value for key, value in more.items()}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    assert set(rates(make_schedule(name, optimizer, warmup=2, total=40, arguments=more), optimizer)) == {0.0}


@pytest.mark.parametrize(("name", "option"), [("cosine_with_min_lr", "min_lr"), ("polynomial", "lr_end")])
def test_a_final_rate_above_a_peak_of_0(name: str, option: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    with pytest.raises(ConfigError, match=f"{option}: 1e-06 with a peak learning rate of 0.*set learning_rate"):
        make_schedule(name, optimizer, warmup=0, total=3, arguments={option: 1e-6})


def test_a_warmup_longer_than_the_training_is_said(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    make_schedule("linear", optimizer, warmup=5, total=3)
    assert "never reaches its peak" in caplog.text
    caplog.clear()
    make_schedule("linear", optimizer, warmup=3, total=3)
    assert not caplog.text


def test_a_decay_that_a_short_run_does_not_reach() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule("warmup_stable_decay", optimizer, warmup=100, total=8, arguments={"num_decay_steps": 100})
    assert rates(schedule, optimizer)[:3] == pytest.approx([0.0, 0.01, 0.02])


def test_a_schedule_made_after_another_has_the_same_peak() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    made = []
    for _ in range(2):
        # The first one has set the rate to 0, for its warmup.
        arguments = {"min_lr": 1e-3}
        made.append(
            rates(make_schedule("cosine_with_min_lr", optimizer, warmup=2, total=9, arguments=arguments), optimizer)
        )
    assert made[0] == made[1]


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adafactor", "radam"])
def test_optimizers_of_torch(name: str) -> None:
    args = TrainingArguments(optim=name, learning_rate=0.1, weight_decay=0.2, optim_args=None)
    cls, said = optimizer_class(args, CPU)
    model = Tagger()
    made = cls(parameter_groups(model, decaying_names(model), args.weight_decay), **said)
    assert [group["weight_decay"] for group in made.param_groups] == [0.2, 0.0]
    assert cls.__module__.startswith("torch.optim")


def test_a_plateau_schedule_takes_torchs_own_minimum() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule("reduce_lr_on_plateau", optimizer, warmup=0, total=10, arguments={"min_lr": 0.25})
    assert schedule.min_lrs == [0.25]


def test_an_argument_that_the_optimizer_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"SGD has no argument momentun; did you mean momentum\?"):
        run({"optim": "sgd", "optim_args": "momentun=0.9"}, str(tmp_path))


def test_fused_where_torch_can() -> None:
    args = TrainingArguments()
    assert optimizer_class(args, torch.device("cuda"))[1]["fused"] is True
    assert optimizer_class(args, torch.device("meta"))[1]["fused"] is False
    assert optimizer_class(TrainingArguments(optim_args="amsgrad=true, foreach=False"), CPU)[1]["amsgrad"] is True


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(MissingExtraError, match="schedulefree"):
        optimizer_class(TrainingArguments(optim="schedule_free_sgd"), CPU)


def test_norms_and_biases_do_not_decay() -> None:
    names = decaying_names(Tagger(blocks=1))
    assert names == ["tokens.weight", "blocks.0.up.weight", "blocks.0.down.weight", "head.weight"]


def test_batches_of_samples_that_are_about_as_long() -> None:
    lengths = torch.randint(1, 100, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthGroupedSampler(lengths, 8)
    order = list(sampler)
    assert sorted(order) == list(range(400))
    assert lengths[order[0]] == max(lengths)
    spread = [max(part) - min(part) for at in range(0, 400, 8) if (part := [lengths[i] for i in order[at : at + 8]])]
    assert sum(spread) / len(spread) < 20, "a random batch spreads over about 75"
    assert list(sampler) != order


def test_samples_become_batches() -> None:
    batch = default_collator([{"x": [1, 2], "label": 1, "text": "a"}, {"x": [3, 4], "label": 0, "text": "b"}])
    assert sorted(batch) == ["labels", "x"]
    assert batch["x"].tolist() == [[1, 2], [3, 4]]
    assert batch["labels"].tolist() == [1, 0]
    numbers, targets = default_collator([(torch.zeros(2), 1), (torch.ones(2), 0)])
    assert (numbers.shape, targets.tolist()) == ((2, 2), [1, 0])


def test_columns_that_the_model_does_not_take() -> None:
    kept = columns_of(Tagger(), ["labels"])
    assert kept is not None
    batch = Columns(default_collator, kept)([{"input_ids": [1], "label": 2, "other": 3}])
    assert sorted(batch) == ["input_ids", "labels"]
    assert columns_of(nn.Sequential(), []) is not None

    class Open(nn.Module):
        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            return inputs["x"]

    assert columns_of(Open(), []) is None
