"""Loaders of random configurations, iterated under Accelerate or its twin; as a program it records the former.

python -m tests.compat.loader_cases
torchrun --nproc-per-node 2 -m tests.compat.loader_cases
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

if TYPE_CHECKING:
    from collections.abc import Iterator

REAL = "accelerate"
TWIN = "paceline.compat.accelerate"
RECORDED = Path(__file__).parents[1] / "data" / "compat"
RECORDED_SEEDS = range(16)


class Noisy(Dataset[Any]):
    """Draws from torch's global generator for each sample."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": torch.tensor(index), "noise": torch.randn(2), "nested": (torch.tensor([float(index)]),)}


class NoisyStream(IterableDataset[Any]):
    def __init__(self, size: int, *, generator: bool) -> None:
        self.size = size
        if generator:
            self.generator = torch.Generator()

    def samples(self, epoch: int) -> Iterator[dict[str, Any]]:
        generator = getattr(self, "generator", None)
        for index in range(self.size):
            noise = torch.randn(1, generator=generator)
            yield {"index": torch.tensor(index + 1000 * epoch), "noise": torch.randn(2), "own": noise}

    def __iter__(self) -> Iterator[Any]:
        return self.samples(0)


class EpochStream(NoisyStream):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return self.samples(self.epoch)


class SizedStream(EpochStream):
    def __len__(self) -> int:
        return self.size


@dataclass
class Case:
    """A loader, how it is prepared, and what is done with it."""

    loader: DataLoader[Any]
    settings: dict[str, Any]
    sets_epoch: bool
    skips: int
    breaks: bool
    rebalances: bool
    description: str


def draw_case(seed: int, ranks: int) -> Case:
    """The case of a seed; the same on all ranks and for both packages."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    batch_size, drop_last = draw.choice([1, 2, 3, 4]), draw.random() < 0.3
    size = draw.choice([1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 23])
    # A worker takes a second to start.
    workers = int(draw.random() < 0.02)
    kind = draw.choice(
        ["stream", "epochs", "sized", "plain", "plain", "random", "random", "own", "weighted", "batches"]
    )
    loader = DataLoader(
        **_source(kind, size, batch_size, drop_last, draw),
        num_workers=workers,
        generator=torch.Generator().manual_seed(seed) if draw.random() < 0.2 else None,
    )
    is_stream = kind in ("stream", "epochs", "sized")
    settings: dict[str, Any] = {
        "split_batches": draw.random() < 0.3 and batch_size % ranks == 0,
        # Without a generator of its own, each rank would see another stream.
        "dispatch_batches": draw.choice([None, True, False]),
        "even_batches": draw.random() < 0.7,
        "use_seedable_sampler": draw.random() < 0.4,
        "data_seed": draw.choice([None, 5]),
        "use_stateful_dataloader": draw.random() < 0.25,
        "rng_types": draw.choice([["generator"], ["torch"], ["torch", "generator"], None]),
    }
    dispatches = settings["dispatch_batches"] or (settings["dispatch_batches"] is None and is_stream)
    if dispatches:
        share = batch_size * (1 if settings["split_batches"] else ranks)
        # What Accelerate gives of fewer samples is wrong: see `few_dispatched`.
        _enlarge(loader, share if drop_last else -(-ranks // 2))
    skips = draw.choice([0, 0, 1])
    if (dispatches and not is_stream) or settings["use_stateful_dataloader"]:
        skips = 0
    described = f"{kind} {size=} {batch_size=} {drop_last=} {workers=} {settings} {skips=}"
    return Case(
        loader=loader,
        settings=settings,
        sets_epoch=draw.random() < 0.3,
        skips=skips,
        breaks=draw.random() < 0.2,
        rebalances=draw.random() < 0.1,
        description=described,
    )


def _enlarge(loader: DataLoader[Any], size: int) -> None:
    """Let a loader read at least `size` samples."""
    dataset: Any = loader.dataset
    dataset.size = max(size, dataset.size)
    if isinstance(loader.sampler, WeightedRandomSampler):
        loader.sampler.num_samples = dataset.size
        loader.sampler.weights = torch.ones(dataset.size, dtype=torch.double)


def few_dispatched(package: str, size: int, drop_last: bool) -> list[list[int]] | str:
    """What this rank gets of `size` samples that rank 0 dispatches in batches of 2, or the kind of error."""
    stand_ready(package)
    loaders: Any = importlib.import_module(f"{package}.data_loader")
    states: Any = importlib.import_module(f"{package}.state")
    loader = loaders.prepare_data_loader(
        DataLoader(Noisy(size), batch_size=2, drop_last=drop_last),
        torch.device("cpu"),
        put_on_device=True,
        dispatch_batches=True,
    )
    try:
        return [batch["index"].tolist() for batch in loader]
    except (TypeError, ValueError) as error:
        return type(error).__name__
    finally:
        states.GradientState._reset_state()


def _source(kind: str, size: int, batch_size: int, drop_last: bool, draw: random.Random) -> dict[str, Any]:
    batches: dict[str, Any] = {"batch_size": batch_size, "drop_last": drop_last}
    generator = draw.random() < 0.5
    if kind == "stream":
        return {"dataset": NoisyStream(size, generator=True), **batches}
    if kind == "epochs":
        return {"dataset": EpochStream(size, generator=generator), **batches}
    if kind == "sized":
        return {"dataset": SizedStream(size, generator=generator), **batches}
    dataset = Noisy(size)
    match kind:
        case "random":
            return {"dataset": dataset, "shuffle": True, **batches}
        case "own":
            own = torch.Generator().manual_seed(draw.randrange(99))
            return {"dataset": dataset, "sampler": RandomSampler(dataset, generator=own), **batches}
        case "weighted":
            return {"dataset": dataset, "sampler": WeightedRandomSampler([1.0] * size, size), **batches}
        case "batches":
            return {"dataset": dataset, "batch_sampler": BatchSampler(RandomSampler(dataset), batch_size, drop_last)}
    return {"dataset": dataset, **batches}


def observe(package: str, seed: int) -> list[Any]:
    """Everything that a script can see of a case: batches, ends, and the random numbers drawn around them."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    loaders: Any = importlib.import_module(f"{package}.data_loader")
    states: Any = importlib.import_module(f"{package}.state")
    states.GradientState._reset_state()
    case = draw_case(seed, ranks)
    torch.manual_seed(10 * seed + rank)
    loader = loaders.prepare_data_loader(case.loader, torch.device("cpu"), put_on_device=True, **case.settings)
    if case.rebalances and hasattr(loader.batch_sampler, "num_processes"):
        loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
    seen: list[Any] = [case.description, isinstance(loader, DataLoader), _draw()]
    try:
        seen.append(len(loader))
    except TypeError:
        seen.append(None)
    dispatches = type(loader).__name__ == "DataLoaderDispatcher"
    for epoch in range(3):
        if case.sets_epoch:
            loader.set_epoch(2 * epoch)
        limit = 1 if case.breaks and epoch == 1 else None
        seen += _pass(loader, states.GradientState(), limit=limit, with_position=not dispatches, with_remainder=True)
    if case.skips:
        skipping = loaders.skip_first_batches(loader, case.skips)
        for one in (skipping, skipping, loader):
            # After a skip Accelerate knows no remainder.
            seen += _pass(one, states.GradientState(), limit=None, with_position=False, with_remainder=False)
    states.GradientState._reset_state()
    # As it comes back from a file.
    return list(json.loads(json.dumps(seen)))


def _pass(loader: Any, gradients: Any, *, limit: int | None, with_position: bool, with_remainder: bool) -> list[Any]:
    seen: list[Any] = []
    for position, batch in enumerate(loader):
        at_end = gradients.end_of_dataloader
        remainder = gradients.remainder if at_end and with_remainder else None
        seen.append([tree_map(_plain, batch), at_end, remainder, _draw()])
        if with_position and loader.use_stateful_dataloader:
            seen.append(str(tree_map(_plain, loader.state_dict())))
        if position == limit:
            break
    return [*seen, gradients.in_dataloader, _draw()]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _draw() -> float:
    return float(torch.randn(()))


def stand_ready(package: str) -> None:
    """Make the states that loaders ask for."""
    accelerator = importlib.import_module(f"{package}.accelerator").Accelerator(cpu=True)
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1"))


def observations(package: str, seeds: range) -> list[list[Any]]:
    """What is seen of many cases."""
    stand_ready(package)
    return [observe(package, seed) for seed in seeds]


def record() -> None:
    """Write what Accelerate shows of the recorded seeds."""
    seen = observations(REAL, RECORDED_SEEDS)
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    RECORDED.mkdir(parents=True, exist_ok=True)
    (RECORDED / f"loaders_rank{rank}_of_{ranks}.json").write_text(
        "[\n" + ",\n".join(json.dumps(one) for one in seen) + "\n]\n"
    )


if __name__ == "__main__":
    record()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(0)
