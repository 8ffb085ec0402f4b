"""Objects of the script that hold sharded tensors: saved under one layout, loaded under another, to the bit."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from paceline import Accelerator
from paceline.checkpoint import open_checkpoint
from paceline.errors import CheckpointError, PrepareError, StateError
from tests.support.engines import with_deepspeed
from tests.support.ranks import run_on_ranks
from tests.support.training import DDP, FSDP, FSDP_FOUR, HSDP, SINGLE, ZERO, Layout, build
from tests.support.warned import warnings_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

# Rows that divide by no number of ranks, and fewer rows than ranks.
SHAPES = (5, 7, 1)


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(SHAPES[0], SHAPES[1]), nn.Tanh(), nn.Linear(SHAPES[1], SHAPES[2]))


class Run:
    """A tiny training with something that is registered beside it."""

    def __init__(self, layout: Layout, register: Callable[[Run], Any] | None = None, **arguments: Any) -> None:
        self.accelerator = build(layout, "cpu", **arguments)
        torch.manual_seed(3)
        whole: Any = two_layers()
        self.model, self.optimizer = self.accelerator.prepare(whole, torch.optim.SGD(whole.parameters(), lr=0.5))
        self.object: Any = None
        if register is not None:
            self.object = register(self)
            self.accelerator.register_for_checkpointing(self.object)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            x = torch.ones(2, SHAPES[0]) * (self.accelerator.process_index + 1)
            self.accelerator.backward(self.model(x).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
            if hasattr(self.object, "update"):
                self.object.update(self.accelerator.unwrap_model(self.model))

    def values(self) -> dict[str, Tensor]:
        return {name: gathered(value) for name, value in self.object.tensors().items()}


def gathered(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


class Average:
    """A moving average of all parameters, by name."""

    dtype = torch.float32

    def __init__(self, run: Run) -> None:
        parameters = run.accelerator.unwrap_model(run.model).named_parameters()
        self.shadow = {name: p.detach().clone().to(self.dtype) for name, p in parameters}
        self.count = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.count += 1
        for name, p in model.named_parameters():
            self.shadow[name].lerp_(p.detach().to(self.dtype), 0.25)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        for name, value in self.shadow.items():
            assert type(value) is type(state["shadow"][name])
            value.copy_(state["shadow"][name])

    def tensors(self) -> dict[str, Tensor]:
        return self.shadow


class HalfAverage(Average):
    """In another dtype than the parameters."""

    dtype = torch.bfloat16


class ListAverage(Average):
    """Takes what it gets in place of what it had, in a list without names."""

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": list(self.shadow.values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = dict(zip(self.shadow, state["shadow"], strict=True))


AVERAGES = {"average": Average, "half": HalfAverage, "list": ListAverage}


def save(layout: Layout, kind: str, folder: str) -> dict[str, Tensor]:
    run = Run(layout, AVERAGES[kind])
    run.step(2)
    run.accelerator.save_state(folder)
    return run.values()


def load(layout: Layout, kind: str, folder: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    run = Run(layout, AVERAGES[kind])
    run.step()
    run.accelerator.load_state(folder)
    values, kinds = run.values(), {name: type(v).__name__ for name, v in run.object.tensors().items()}
    run.step()
    return values, kinds


PAIRS = [
    (FSDP, SINGLE, "average"),
    (FSDP, DDP, "half"),
    (DDP, FSDP, "list"),
    (SINGLE, FSDP, "average"),
    (FSDP, FSDP, "half"),
    *[
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in [
            (FSDP, FSDP_FOUR, "average"),
            (FSDP_FOUR, FSDP, "list"),
            (FSDP, HSDP, "list"),
            (HSDP, SINGLE, "half"),
            (DDP, HSDP, "average"),
        ]
    ],
    *with_deepspeed([(FSDP, ZERO[2], "average"), (ZERO[2], FSDP, "half")]),
]


@pytest.mark.parametrize(("one", "other", "kind"), PAIRS, ids=str)
def test_an_average_goes_from_one_layout_to_another(one: Layout, other: Layout, kind: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "state")
    saved = run_on_ranks(one.ranks, save, one, kind, folder)[0]
    for values, kinds in run_on_ranks(other.ranks, load, other, kind, folder):
        assert set(kinds.values()) == ({"DTensor"} if other.strategy == "fsdp" else {"Tensor"})
        assert values.keys() == saved.keys()
        for name, value in values.items():
            assert value.dtype == AVERAGES[kind].dtype
            assert torch.equal(value, saved[name]), name
    # Plain files, which anybody reads.
    tensors = open_checkpoint(folder)
    for index, (name, value) in enumerate(saved.items()):
        key = f"custom_0/state.shadow.{index if kind == 'list' else name}"
        assert torch.equal(tensors.read(key), value)


# Saved in the background, while the average goes on


def in_the_background(layout: Layout, folder: str) -> None:
    run = Run(layout, Average)
    run.step(2)
    before = run.values()
    run.accelerator.save_state(folder, blocking=False)
    run.step(3)
    after = run.values()
    # At once, with the save perhaps not yet whole.
    run.accelerator.load_state(folder)
    loaded = run.values()
    for name, value in before.items():
        assert torch.equal(loaded[name], value)
    assert not torch.equal(before["0.weight"], after["0.weight"])
    assert run.object.count == 2


@pytest.mark.parametrize("layout", [SINGLE, DDP, FSDP], ids=str)
def test_what_is_saved_is_what_was_there_then(layout: Layout, tmp_path: Path) -> None:
    run_on_ranks(layout.ranks, in_the_background, layout, str(tmp_path / "state"))


# torch's own averages


class Swa:
    """An AveragedModel that is updated with the model."""

    def __init__(self, averaged: AveragedModel) -> None:
        self.averaged = averaged

    def update(self, model: nn.Module) -> None:
        self.averaged.update_parameters(model)

    def tensors(self) -> dict[str, Tensor]:
        return {**dict(self.averaged.module.named_parameters()), "n": self.averaged.n_averaged}


def swa(layout: Layout, folder: str, how: str) -> dict[str, Tensor]:
    """Average three steps and save, or one, and load."""
    run = Run(layout)
    averaged: Any = AveragedModel(two_layers())
    if how.startswith("registered"):
        averaged = AveragedModel(run.accelerator.unwrap_model(run.model))
        run.accelerator.register_for_checkpointing(averaged)
    else:
        averaged = run.accelerator.unwrap_model(run.accelerator.prepare(averaged))
    run.object = Swa(averaged)
    run.step(3)
    if how.endswith("saved"):
        run.accelerator.save_state(folder)
        return run.values()
    run.accelerator.load_state(folder)
    values = run.values()
    run.step()
    return values


@pytest.mark.parametrize(
    ("how", "one", "other"),
    [("registered", DDP, SINGLE), ("prepared", FSDP, SINGLE), ("prepared", DDP, FSDP)],
    ids=str,
)
def test_averaged_models_of_torch(how: str, one: Layout, other: Layout, tmp_path: Path) -> None:
    folder = str(tmp_path / "state")
    saved = run_on_ranks(one.ranks, swa, one, folder, f"{how} saved")[0]
    assert saved["n"] == 3
    for loaded in run_on_ranks(other.ranks, swa, other, folder, f"{how} loaded"):
        assert loaded.keys() == saved.keys()
        for name, value in saved.items():
            assert torch.equal(loaded[name], value), name


def copied_too_late(how: str) -> str:
    accelerator = Accelerator(cpu=True, strategy="fsdp")
    model: Any = accelerator.prepare(two_layers())
    make, source = (AveragedModel, model) if how == "average" else (copy.deepcopy, nn.ModuleList([model]))
    with pytest.raises(PrepareError) as error:
        make(source)
    return str(error.value)


@pytest.mark.parametrize("how", ["average", "inside"])
def test_a_copy_of_a_sharded_model_is_refused_with_a_remedy(how: str) -> None:
    for message in run_on_ranks(2, copied_too_late, how):
        assert "which FSDP has sharded" in message
        assert "prepare(model, AveragedModel(model))" in message


def averaged_forward(strategy: str) -> tuple[Tensor, Tensor]:
    """Train and average, and what the average computes."""
    accelerator = Accelerator(cpu=True, strategy=strategy)
    torch.manual_seed(0)
    model: Any = two_layers()
    average: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.5)
    model, average, optimizer = accelerator.prepare(model, average, optimizer)
    inner: Any = accelerator.unwrap_model(average)
    data = torch.randn(4, 8, SHAPES[0], generator=torch.Generator().manual_seed(1))
    for rows in data:
        accelerator.backward(model(rows[accelerator.process_index :: accelerator.num_processes]).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
        inner.update_parameters(model)
    with torch.no_grad():
        out: Tensor = average(data[0])
        return out, model(data[0])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_average_that_is_prepared_with_the_model_is_that_of_one_process(strategy: str) -> None:
    average, model = averaged_forward("single")
    assert not torch.allclose(average, model, atol=1e-3)
    for found, _ in run_on_ranks(2, averaged_forward, strategy):
        assert torch.allclose(found, average, atol=1e-6)


# Tensors that are cut otherwise


class Holder:
    """Holds one tensor; takes what it gets."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def mesh_of(*sizes: int) -> Any:
    return init_device_mesh("cpu", sizes)


def placed(whole: Tensor, placements: list[Any], sizes: tuple[int, ...]) -> Any:
    return distribute_tensor(whole, mesh_of(*sizes), placements)


WHOLE: dict[str, tuple[Tensor, list[Any]]] = {
    "columns": (torch.arange(15.0).view(5, 3), [Shard(1)]),
    "rows": (torch.arange(21).view(7, 3), [Shard(0)]),
    "copies": (torch.arange(4).bool(), [Replicate()]),
    "few rows": (torch.randn(1, 4, generator=torch.Generator().manual_seed(1)).bfloat16(), [Shard(0)]),
    "scalar": (torch.tensor(2.5), [Replicate()]),
    "complex": (torch.arange(6.0).view(3, 2) * (1 + 2j), [Shard(0)]),
    "none": (torch.zeros(0, 4), [Shard(0)]),
}


def any_cut(folder: str) -> None:
    run = Run(DDP)
    holders = [Holder(placed(whole.clone(), where, (2,))) for whole, where in WHOLE.values()]
    nested = Holder([{"a.b": placed(torch.ones(3), [Shard(0)], (2,)), "a": {"b": torch.zeros(3)}}])
    run.accelerator.register_for_checkpointing(*holders, nested)
    run.accelerator.save_state(folder)
    other = Run(DDP)
    # Back into whatever each is cut like now.
    rows, columns, copies = [Shard(0)], [Shard(1)], [Replicate()]
    cuts: list[list[Any]] = [rows, columns, rows, copies, copies, copies, rows]
    again = [Holder(placed(torch.zeros_like(w), cut, (2,))) for (w, _), cut in zip(WHOLE.values(), cuts, strict=True)]
    inner = Holder([{"a.b": torch.zeros(3), "a": {"b": placed(torch.ones(3), [Shard(0)], (2,))}}])
    other.accelerator.register_for_checkpointing(*again, inner)
    other.accelerator.load_state(folder)
    for (name, (whole, _)), holder, cut in zip(WHOLE.items(), again, cuts, strict=True):
        assert isinstance(holder.value, DTensor), name
        assert holder.value.placements == tuple(cut), name
        assert holder.value.dtype == whole.dtype
        assert torch.equal(holder.value.full_tensor(), whole), name
    assert torch.equal(gathered(inner.value[0]["a.b"]), torch.ones(3))
    assert torch.equal(gathered(inner.value[0]["a"]["b"]), torch.zeros(3))
    plain = Run(DDP)
    bare = [Holder(torch.zeros(0)) for _ in WHOLE]
    plain.accelerator.register_for_checkpointing(*bare, Holder(None))
    plain.accelerator.load_state(folder)
    for (name, (whole, _)), holder in zip(WHOLE.items(), bare, strict=True):
        assert torch.equal(holder.value, whole), name


def test_tensors_may_be_cut_in_any_way(tmp_path: Path) -> None:
    run_on_ranks(2, any_cut, str(tmp_path / "state"))


def on_two_axes(folder: str) -> None:
    run = Run(Layout("ddp4", 4, "ddp"))
    whole = torch.arange(55.0).view(11, 5)
    rows, copies = Shard(0), Replicate()
    ways: list[list[Any]] = [[rows, rows], [copies, rows], [rows, Shard(1)], [rows, copies]]
    run.accelerator.register_for_checkpointing(*[Holder(placed(whole, way, (2, 2))) for way in ways])
    run.accelerator.save_state(folder)
    other = Run(Layout("ddp4", 4, "ddp"))
    again = [Holder(placed(torch.zeros(11, 5), way, (2, 2))) for way in reversed(ways)]
    other.accelerator.register_for_checkpointing(*again)
    other.accelerator.load_state(folder)
    for holder, way in zip(again, reversed(ways), strict=True):
        assert holder.value.placements == tuple(way)
        assert torch.equal(holder.value.full_tensor(), whole), way


@pytest.mark.slow
def test_tensors_on_two_axes(tmp_path: Path) -> None:
    run_on_ranks(4, on_two_axes, str(tmp_path / "state"))


def sums(folder: str) -> None:
    run = Run(DDP)
    local = torch.full((4,), float(dist.get_rank() + 1))
    summands = DTensor.from_local(local, mesh_of(2), [Partial()], run_check=False)
    run.accelerator.register_for_checkpointing(Holder(summands))
    run.accelerator.save_state(folder)
    other = Run(DDP)
    holder = Holder(placed(torch.zeros(4), [Shard(0)], (2,)))
    other.accelerator.register_for_checkpointing(holder)
    other.accelerator.load_state(folder)
    assert torch.equal(holder.value.full_tensor(), torch.full((4,), 3.0))
    with pytest.raises(StateError, match=r"placed \(Partial\(sum\),\).*summands.*redistributed"):
        run.accelerator.load_state(folder)


def test_summands_are_saved_as_their_sum(tmp_path: Path) -> None:
    run_on_ranks(2, sums, str(tmp_path / "state"))


# What cannot be


def other_shapes(folder: str) -> None:
    run = Run(DDP, lambda _: Holder(placed(torch.ones(4, 2), [Shard(0)], (2,))))
    run.accelerator.save_state(folder)
    other = Run(DDP, lambda _: Holder(placed(torch.ones(5, 2), [Shard(0)], (2,))))
    with pytest.raises(StateError, match=r"shape \(4, 2\) in the checkpoint and \(5, 2\) in this run, sharded"):
        other.accelerator.load_state(folder)


def test_another_shape_is_named(tmp_path: Path) -> None:
    run_on_ranks(2, other_shapes, str(tmp_path / "state"))


def old_sharded_tensors(folder: str) -> None:
    from torch.distributed._shard.sharded_tensor import init_from_local_shards
    from torch.distributed._shard.sharded_tensor.shard import Shard as OldShard

    rank = dist.get_rank()
    local = OldShard.from_tensor_and_offsets(torch.ones(2, 3), [2 * rank, 0], rank)
    run = Run(DDP, lambda _: Holder(init_from_local_shards([local], 4, 3)))
    with pytest.raises(CheckpointError, match=r"custom_0/state\.value is a ShardedTensor.*Give a DTensor"):
        run.accelerator.save_state(folder)


def test_sharded_tensors_of_before_are_named(tmp_path: Path) -> None:
    run_on_ranks(2, old_sharded_tensors, str(tmp_path / "state"))
    assert list(tmp_path.iterdir()) == []


def empty_copies(folder: str) -> None:
    run = Run(ZERO[3], Average)
    with pytest.raises(CheckpointError, match=r"shadow\.0\.weight.*empty copies.*gather_parameters"):
        run.accelerator.save_state(folder)
    with run.accelerator.gather_parameters(run.model):
        whole = Average(run)
    run.object.shadow = whole.shadow
    run.accelerator.save_state(folder)


@pytest.mark.parametrize("layout", with_deepspeed([ZERO[3]]), ids=str)
def test_empty_copies_of_released_parameters_are_named(layout: Layout, tmp_path: Path) -> None:
    folder = str(tmp_path / "state")
    run_on_ranks(layout.ranks, empty_copies, folder)
    torch.manual_seed(3)
    weight = nn.Linear(SHAPES[0], SHAPES[1]).weight
    assert torch.equal(open_checkpoint(folder).read("custom_0/state.shadow.0.weight"), weight)


class Late(Average):
    """Has nothing before it is loaded."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.shadow = {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = state["shadow"]


def late(folder: str) -> list[str]:
    run = Run(FSDP, Average)
    run.step()
    run.accelerator.save_state(folder)
    saved = run.values()
    with warnings_of() as warned:
        other = Run(FSDP, Late)
        other.accelerator.load_state(folder)
    for name, value in other.object.shadow.items():
        assert type(value) is torch.Tensor
        assert torch.equal(value, saved[name])
    return warned


def test_an_object_without_tensors_gets_them_whole_with_a_word(tmp_path: Path) -> None:
    warned, _ = run_on_ranks(2, late, str(tmp_path / "state"))
    assert ["was saved sharded and is loaded whole" in line for line in warned] == [True]


class Fussy(Average):
    """Refuses names that it does not know."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.shadow = {f"mine.{name}": value for name, value in self.shadow.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.shadow:
            self.shadow[name].copy_(state["shadow"][name])


def fussy(folder: str) -> None:
    run = Run(DDP, Average)
    run.accelerator.save_state(folder)
    other = Run(DDP, Fussy)
    with pytest.raises(StateError, match=r"object 0 \(Fussy\).*only saved: shadow\.0\.bias.*only here: shadow\.mine\."):
        other.accelerator.load_state(folder)


def test_names_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    run_on_ranks(2, fussy, str(tmp_path / "state"))


def rows_that_do_not_follow() -> None:
    from torch.distributed.tensor.placement_types import _StridedShard

    from paceline.strategies.state import local_shard

    # As FSDP2 places a weight whose rows tensor parallelism has sharded before.
    apart = DTensor.from_local(torch.zeros(2, 3), mesh_of(2), [_StridedShard(0, split_factor=2)], run_check=False)
    with pytest.raises(StateError, match=r"_StridedShard.*sharded by rows"):
        local_shard(apart)
    rows = local_shard(placed(torch.arange(15.0).view(5, 3), [Shard(0)], (2,)))
    assert (rows.shape, rows.start) == ((5, 3), 9 * dist.get_rank())
    assert local_shard(placed(torch.tensor(1.0), [Replicate()], (2,))).start == 0


def test_a_strategy_saves_no_rows_that_do_not_follow_each_other() -> None:
    run_on_ranks(2, rows_that_do_not_follow)
