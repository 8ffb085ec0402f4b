"""Every sample is counted exactly once, whatever divides by what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from paceline import Accelerator, DataLoaderConfiguration
from tests.support.engines import slowly
from tests.support.ranks import run_on_ranks
from tests.unit.data.support import PlainStream, SplittingStream

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLES = 10_007  # a prime: no number of ranks or batch size divides it


class Samples(Dataset[dict[str, Any]]):
    def __init__(self, count: int = SAMPLES) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": index, "pair": (float(index), -index), "name": f"sample {index}"}


def as_tensor(batch: dict[str, Any]) -> Any:
    return batch["id"]


def as_dict(batch: dict[str, Any]) -> Any:
    return {"ids": batch["id"], "squares": batch["id"] ** 2}


def as_strings(batch: dict[str, Any]) -> Any:
    return list(batch["name"])


def as_mix(batch: dict[str, Any]) -> Any:
    return {"deep": [(batch["pair"][0], batch["pair"][1])], "rows": torch.stack([batch["id"]] * 3, dim=1)}


def ids_of(shape: str, gathered: list[Any]) -> list[list[int]]:
    """The ids as each part of the gathered values tells them: all parts must agree."""

    def join(pick: Callable[[Any], Tensor]) -> list[int]:
        return [int(value) for batch in gathered for value in pick(batch)]

    match shape:
        case "tensor":
            return [join(lambda batch: batch)]
        case "dict":
            squares = join(lambda batch: batch["squares"])
            ids = join(lambda batch: batch["ids"])
            assert squares == [value**2 for value in ids]
            return [ids]
        case "strings":
            return [[int(name.split()[1]) for batch in gathered for name in batch]]
        case _:
            return [
                join(lambda batch: batch["deep"][0][0]),
                join(lambda batch: -batch["deep"][0][1]),
                join(lambda batch: batch["rows"][:, 2]),
            ]


SHAPES = {"tensor": as_tensor, "dict": as_dict, "strings": as_strings, "mix": as_mix}


@dataclass(frozen=True)
class Case:
    """What the loader is like."""

    batch_size: int = 100
    workers: int = 0
    shuffle: bool = False
    count: int = SAMPLES
    even_batches: bool = True
    split_batches: bool = False
    drop_last: bool = False


def evaluate(shape: str, case: Case) -> tuple[list[list[int]], int, int]:
    """The ids that rank's gathered values hold, the batches it saw and the rows it was given."""
    config = DataLoaderConfiguration(even_batches=case.even_batches, split_batches=case.split_batches)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    loader = accelerator.prepare(
        DataLoader(
            Samples(case.count),
            case.batch_size,
            shuffle=case.shuffle,
            num_workers=case.workers,
            drop_last=case.drop_last,
        )
    )
    gathered, batches, rows = [], 0, 0
    for batch in loader:
        batches += 1
        rows += len(batch["id"])
        gathered.append(accelerator.gather_for_metrics(SHAPES[shape](batch)))
    return ids_of(shape, gathered), batches, rows


def check_once(results: list[tuple[list[list[int]], int, int]], count: int) -> None:
    for ids, _, _ in results:
        for told in ids:
            assert len(told) == count
            assert sorted(told) == list(range(count))
    assert results[0][0] == results[1][0], "ranks disagree about the order"


@pytest.mark.parametrize("shape", SHAPES)
def test_each_sample_counts_once_over_three_ranks(shape: str) -> None:
    results = run_on_ranks(3, evaluate, shape, Case())
    check_once(results, SAMPLES)
    assert len({batches for _, batches, _ in results}) == 1
    assert sum(rows for _, _, rows in results) > SAMPLES, "nothing was filled up, so nothing was tested"


@pytest.mark.parametrize("shape", ["tensor", "strings"])
@pytest.mark.parametrize(
    "case",
    [
        # Without filling up, all ranks must have as many batches, or one of them gathers alone.
        Case(batch_size=3400, even_batches=False),
        Case(split_batches=True, batch_size=99),
        Case(split_batches=True, batch_size=6000, even_batches=False),
        Case(shuffle=True),
        Case(batch_size=5000),
    ],
    ids=str,
)
def test_each_sample_counts_once_in_every_layout(case: Case, shape: str) -> None:
    results = run_on_ranks(3, evaluate, shape, case)
    check_once(results, SAMPLES)
    if not case.even_batches:
        assert sum(rows for _, _, rows in results) == SAMPLES


@pytest.mark.parametrize(
    ("count", "even"), [(1, True), (2, True), (3, True), (7, True), (13, True), (9, False), (12, False)]
)
def test_small_sets_count_once_too(count: int, even: bool) -> None:
    results = run_on_ranks(3, evaluate, "mix", Case(batch_size=4, count=count, even_batches=even), timeout=800)
    check_once(results, count)


def test_dropped_samples_stay_dropped() -> None:
    results = run_on_ranks(3, evaluate, "tensor", Case(batch_size=10, count=95, drop_last=True))
    told = results[0][0][0]
    assert len(told) == len(set(told)) == 90


@pytest.mark.slow
def test_each_sample_counts_once_with_workers() -> None:
    check_once(run_on_ranks(3, evaluate, "tensor", Case(batch_size=512, workers=2)), SAMPLES)


def scalars(fill: bool) -> list[Any]:
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(Samples(10), 4))
    loader.fill_batches = fill
    rank = accelerator.process_index
    found = []
    for batch in loader:
        values = {"loss": torch.tensor(float(rank)), "ids": batch["id"], "epoch": 3, "tag": "x", "none": None}
        if not fill:
            values["other"] = torch.tensor([10.0 * rank, 1.0, 2.0, 3.0, 4.0, 5.0])
        found.append(accelerator.gather_for_metrics(values))
    return [{key: value.tolist() if torch.is_tensor(value) else value for key, value in one.items()} for one in found]


@pytest.mark.parametrize("fill", [True, False])
def test_values_of_a_rank_are_all_kept(fill: bool) -> None:
    for found in run_on_ranks(3, scalars, fill):
        assert [n for one in found for n in one["ids"]] == list(range(10))
        for one in found:
            assert one["loss"] == [0.0, 1.0, 2.0]
            assert fill or len(one["other"]) == 18
            assert (one["epoch"], one["tag"], one["none"]) == ([3] * 3, ["x"] * 3, [None] * 3)


def objects() -> list[str]:
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(Samples(11), 2))
    found: list[str] = []
    for batch in loader:
        found += accelerator.gather_for_metrics(list(batch["name"]), use_gather_object=True)
    return found


def test_gathered_objects_count_once() -> None:
    for found in run_on_ranks(3, objects):
        assert sorted(found) == sorted(f"sample {n}" for n in range(11))


# Streams

STREAMS: dict[str, Callable[[int], Any]] = {"splits itself": SplittingStream, "naive": PlainStream}


def read_stream(name: str, count: int, workers: int) -> list[int]:
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(STREAMS[name](count), batch_size=4, num_workers=workers))
    return [int(n) for batch in loader for n in accelerator.gather_for_metrics(batch)]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("naive", 1),
        ("splits itself", 50),
        *slowly([("naive", 50), ("naive", 64), ("splits itself", 1), ("splits itself", 64)]),
    ],
)
def test_a_stream_is_evaluated_once(name: str, count: int) -> None:
    for found in run_on_ranks(2, read_stream, name, count, 2):
        assert sorted(found) == list(range(count))


# An evaluation inside a training loop


def nested(leave: str) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True, strategy="ddp", gradient_accumulation_steps=2)
    model: Any = nn.Linear(1, 1, bias=False)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.0)
    train: Any = DataLoader(TensorDataset(torch.arange(20.0)[:, None]), batch_size=2)
    test: Any = DataLoader(TensorDataset(torch.arange(11.0)[:, None]), batch_size=2)
    model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)
    seen: dict[str, Any] = {"sync": [], "last": [], "counted": [], "after": []}
    for step, (batch,) in enumerate(train):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).mean())
            optimizer.step()
            optimizer.zero_grad()
        if step in (0, 2):  # once inside a window, once at its beginning
            evaluate_inside(accelerator, test, leave, seen)
        seen["sync"].append(accelerator.sync_gradients)
        seen["last"].append(train.end_of_dataloader)
        seen["after"].append(len(accelerator.gather_for_metrics(batch)))
    return seen


def evaluate_inside(accelerator: Accelerator, test: Any, leave: str, seen: dict[str, Any]) -> None:
    counted = 0
    try:
        for number, (batch,) in enumerate(test):
            counted += len(accelerator.gather_for_metrics(batch))
            if leave == "break" and number == 1:
                break
            if leave == "error" and number == 1:
                raise KeyError
            if leave == "last" and test.end_of_dataloader:
                break
    except KeyError:
        pass
    seen["counted"].append(counted)


@pytest.mark.parametrize(("leave", "counted"), [("never", 11), ("break", 8), ("error", 8), ("last", 11)])
def test_leaving_an_evaluation_does_not_disturb_the_training_around_it(leave: str, counted: int) -> None:
    for seen in run_on_ranks(2, nested, leave):
        # 20 samples, two ranks, batches of two: five micro-batches; the last one closes a window of one.
        assert seen["sync"] == [False, True, False, True, True]
        assert seen["last"] == [False, False, False, False, True]
        assert seen["after"] == [4] * 5, "the outer loader's padding is not confused with the inner one's"
        assert seen["counted"] == [counted, counted]


def outside() -> list[int]:
    """After a pass, and before one, there is nothing to drop."""
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(Samples(5), 2))
    before = len(accelerator.gather_for_metrics(torch.zeros(3)))
    for _ in loader:
        pass
    after = len(accelerator.gather_for_metrics(torch.zeros(2)))
    return [before, after]


def test_outside_of_a_pass_nothing_is_dropped() -> None:
    assert run_on_ranks(2, outside) == [[6, 4]] * 2
