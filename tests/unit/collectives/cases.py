"""What must hold in every group, whatever connects its ranks and however many there are.

Each case is called on every rank with that rank's group.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch

from paceline.collectives import (
    BatchCounts,
    Board,
    Group,
    Pending,
    broadcast,
    broadcast_object_list,
    gather,
    gather_object,
    gather_samples,
    main_process_first,
    pad_across_processes,
    reduce,
)
from paceline.errors import CollectiveError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paceline.collectives import Op

DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip


class Output(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor


class CountingGroup(Group):
    """Counts the exchanges that another group makes."""

    def __init__(self, inner: Group) -> None:
        self.inner, self.rank, self.size, self.device = inner, inner.rank, inner.size, inner.device
        self.calls: Counter[str] = Counter()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls["all_gather"] += 1
        return self.inner.all_gather(tensor)

    def open_board(self, name: str) -> Board:
        return self.inner.open_board(name)

    def start_all_gather(self, tensor: torch.Tensor) -> Pending:
        self.calls["all_gather"] += 1
        return self.inner.start_all_gather(tensor)

    def all_reduce(self, tensor: torch.Tensor, op: Op = "sum") -> torch.Tensor:
        self.calls["all_reduce"] += 1
        return self.inner.all_reduce(tensor, op)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        self.calls["broadcast"] += 1
        return self.inner.broadcast(tensor, source)

    def all_gather_object(self, value: Any) -> list[Any]:
        self.calls["all_gather_object"] += 1
        return self.inner.all_gather_object(value)

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        self.calls["broadcast_object"] += 1
        return self.inner.broadcast_object(value, source)

    def start_scatter(self, parts: Sequence[torch.Tensor] | None, into: torch.Tensor, source: int = 0) -> Pending:
        self.calls["start_scatter"] += 1
        return self.inner.start_scatter(parts, into, source)

    def barrier(self) -> None:
        self.calls["barrier"] += 1
        self.inner.barrier()


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in shape, dtype and every bit of value."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert torch.equal(actual, expected), f"{actual} is not {expected}"


def all_gather_stacks_every_dtype(group: Group) -> None:
    for dtype in DTYPES:
        mine = torch.tensor([[group.rank, 1], [0, 2]]).to(dtype)
        expected = torch.stack([torch.tensor([[r, 1], [0, 2]]).to(dtype) for r in range(group.size)])
        same(group.all_gather(mine).to(torch.complex64), expected.to(torch.complex64))
        assert group.all_gather(mine).dtype == dtype


def all_gather_takes_odd_shapes(group: Group) -> None:
    ranks = torch.arange(group.size)
    same(group.all_gather(torch.tensor(group.rank)), ranks)
    same(group.all_gather(torch.empty(0, 3)), torch.empty(group.size, 0, 3))
    turned = (torch.arange(6).view(2, 3) + 10 * group.rank).t()
    same(group.all_gather(turned), torch.arange(6).view(2, 3).t() + 10 * ranks.view(-1, 1, 1))
    learnt = torch.full((2,), float(group.rank), requires_grad=True)
    assert not group.all_gather(learnt).requires_grad


def started_gathers_may_overlap(group: Group) -> None:
    first = group.start_all_gather(torch.tensor([group.rank]))
    second = group.start_all_gather(torch.tensor([-group.rank]))
    ranks = torch.arange(group.size).view(-1, 1)
    same(second.wait(), -ranks)
    same(first.wait(), ranks)
    assert first.wait() is first.wait()


def all_gather_does_not_alias(group: Group) -> None:
    mine = torch.tensor([group.rank])
    gathered = group.all_gather(mine)
    mine.fill_(99)
    same(gathered, torch.arange(group.size).view(-1, 1))


def all_reduce_works_in_place(group: Group) -> None:
    ranks = range(group.size)
    expected: dict[Op, float] = {
        "sum": sum(r + 1 for r in ranks), "max": group.size, "min": 1, "mean": (group.size + 1) / 2,
    }  # fmt: skip
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        for op, value in expected.items():
            mine = torch.full((2, 2), group.rank + 1.0).to(dtype)
            assert group.all_reduce(mine, op) is mine
            same(mine.float(), torch.full((2, 2), float(value)))


def all_reduce_of_integers(group: Group) -> None:
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        mine = torch.tensor([group.rank, 2], dtype=dtype)
        total = sum(range(group.size))
        same(group.all_reduce(mine.clone()), torch.tensor([total, 2 * group.size], dtype=dtype))
        same(group.all_reduce(mine.clone(), "max"), torch.tensor([group.size - 1, 2], dtype=dtype))
        same(group.all_reduce(mine, "mean"), torch.tensor([total / group.size, 2]))
        same(mine, torch.tensor([group.rank, 2], dtype=dtype))


def all_reduce_of_bool(group: Group) -> None:
    mine = torch.tensor([group.rank == 0, True, False])
    same(group.all_reduce(mine.clone(), "max"), torch.tensor([True, True, False]))
    same(group.all_reduce(mine.clone(), "min"), torch.tensor([group.size == 1, True, False]))
    same(group.all_reduce(mine, "sum"), torch.tensor([1, group.size, 0]))
    same(group.all_reduce(mine, "mean"), torch.tensor([1 / group.size, 1, 0]))


def all_reduce_takes_odd_tensors(group: Group) -> None:
    same(group.all_reduce(torch.tensor(2.0)), torch.tensor(2.0 * group.size))
    same(group.all_reduce(torch.empty(0)), torch.empty(0))
    base = torch.ones(2, 3)
    assert group.all_reduce(base.t()[1]).shape == (2,)
    same(base, torch.tensor([[1.0, group.size, 1.0]] * 2))
    same(group.all_reduce(torch.tensor([1j])), torch.tensor([1j * group.size]))
    # The sum would be beyond float16.
    same(group.all_reduce(torch.tensor([60000.0]).half(), "mean"), torch.tensor([60000.0]).half())
    weight = torch.nn.Parameter(torch.ones(2))
    same(group.all_reduce(weight).detach(), torch.full((2,), float(group.size)))


def all_reduce_refuses(group: Group) -> None:
    with pytest.raises(CollectiveError, match="'median'"):
        group.all_reduce(torch.ones(1), "median")  # type: ignore[arg-type]
    with pytest.raises(CollectiveError, match="no order"):
        group.all_reduce(torch.tensor([1j]), "max")


def broadcast_overwrites_in_place(group: Group) -> None:
    last = group.size - 1
    for dtype in DTYPES:
        mine = torch.full((2,), group.rank).to(dtype)
        assert group.broadcast(mine, last) is mine
        same(mine.to(torch.complex64), torch.full((2,), last).to(dtype).to(torch.complex64))
    base = torch.full((2, 2), float(group.rank))
    group.broadcast(base[:, 0], last)
    same(base, torch.tensor([[float(last), float(group.rank)]] * 2))
    same(group.broadcast(torch.tensor(group.rank), 0), torch.tensor(0))
    with pytest.raises(CollectiveError, match=f"got rank {group.size} as its source"):
        group.broadcast(torch.ones(1), group.size)


def objects_travel(group: Group) -> None:
    last = group.size - 1
    assert group.all_gather_object({"rank": group.rank}) == [{"rank": r} for r in range(group.size)]
    assert group.broadcast_object(f"from {group.rank}", last) == f"from {last}"
    group.barrier()


def started_scatters_may_overlap(group: Group) -> None:
    last = group.size - 1
    mine = [torch.zeros(3, dtype=torch.uint8) for _ in range(2)]
    given = [[torch.full((3,), 10 * n + r, dtype=torch.uint8) for r in range(group.size)] for n in range(2)]
    first = group.start_scatter(given[0] if group.rank == last else None, mine[0], last)
    second = group.start_scatter(given[1] if group.rank == 0 else None, mine[1])
    assert second.wait() is mine[1]
    same(mine[1], torch.full((3,), 10 + group.rank, dtype=torch.uint8))
    same(first.wait(), torch.full((3,), group.rank, dtype=torch.uint8))


def gather_keeps_the_structure(group: Group) -> None:
    rank = group.rank
    data: OrderedDict[str, Any] = OrderedDict(
        out=Output(torch.tensor(float(rank)), torch.full((2, 3), rank, dtype=torch.bfloat16)),
        labels=[torch.tensor([rank, rank + 10]), (torch.tensor([rank > 0]), torch.empty(0, 2))],
        ids=torch.tensor([[rank]], dtype=torch.int16),
    )
    result = gather(group, data, debug=True)
    ranks = torch.arange(group.size)
    assert type(result) is OrderedDict
    assert type(result["out"]) is Output
    same(result["out"].loss, ranks.float())
    same(result["out"].logits, ranks.repeat_interleave(2).view(-1, 1).expand(-1, 3).bfloat16())
    same(result["labels"][0], torch.stack([ranks, ranks + 10], 1).flatten())
    same(result["labels"][1][0], ranks > 0)
    same(result["labels"][1][1], torch.empty(0, 2))
    same(result["ids"], ranks.view(-1, 1).short())
    assert list(data) == list(result)
    assert data["out"].loss.dim() == 0


def gather_takes_one_exchange(group: Group) -> None:
    counting = CountingGroup(group)
    data = {f"k{i}": torch.full((i, 2), group.rank).to(DTYPES[i % 10]) for i in range(20)}
    result = gather(counting, data)
    assert counting.calls == ({"all_gather": 1} if group.size > 1 else {})
    for i in range(20):
        expected = torch.arange(group.size).repeat_interleave(i).view(-1, 1).expand(-1, 2)
        same(result[f"k{i}"], expected.to(DTYPES[i % 10]))


def large_tensors_travel_alone(group: Group) -> None:
    counting = CountingGroup(group)
    big = torch.full((1100, 1000), float(group.rank))
    result = gather(counting, [big, *(torch.tensor([group.rank]) for _ in range(5)), torch.tensor(group.rank)])
    assert counting.calls["all_gather"] == (2 if group.size > 1 else 0)
    same(result[0][::1100, 0], torch.arange(group.size).float())
    for small in result[1:]:
        same(small, torch.arange(group.size))


def a_few_tensors_of_any_kind(group: Group) -> None:
    # No shared buffer: each kind of memory has to be right by itself.
    rank, ranks = group.rank, torch.arange(group.size)
    columns = torch.full((3, 2), rank).t()
    weights = torch.full((2, 2), float(rank), requires_grad=True)
    result = gather(
        group,
        (columns, torch.tensor([rank > 0]), torch.complex(ranks[rank].float(), ranks.new_ones(()).float()).conj()),
    )
    same(result[0], ranks.repeat_interleave(2).view(-1, 1).expand(-1, 3))
    same(result[1], ranks > 0)
    same(result[2].imag, -torch.ones(group.size))
    result = gather(
        group,
        {
            "weights": weights,
            "negative": torch.complex(ranks.float(), ranks.float()).conj().imag,
            "one": torch.full((2, 3), rank)[:1, :1],
        },
    )
    assert not result["weights"].requires_grad
    same(result["weights"], ranks.float().repeat_interleave(2).view(-1, 1).expand(-1, 2))
    same(result["negative"], -ranks.float().repeat(group.size))
    same(result["one"], ranks.view(-1, 1))


def a_few_tensors_may_lie_otherwise_on_each_rank(group: Group) -> None:
    # As padding leaves it: a copy on some ranks, a view on the longest.
    rows = torch.arange(6.0).view(2, 3) + 10 * group.rank
    everyone = torch.cat([torch.arange(6.0).view(2, 3) + 10 * rank for rank in range(group.size)])
    views = {
        "turned": rows.t().contiguous().t(),
        "negative": torch.complex(rows, -rows).conj().imag,
        "every other column": torch.stack([rows, rows], dim=-1).flatten(1)[:, ::2],
    }
    for name, view in views.items():
        mine = view if group.rank == 0 else rows
        joined, ranks = gather(group, (mine, torch.tensor([group.rank])))
        assert torch.equal(joined, everyone), name
        same(ranks, torch.arange(group.size))
    conjugate = torch.complex(rows, rows)
    conjugate = conjugate.conj() if group.rank == 0 else conjugate.conj().resolve_conj()
    same(gather(group, [conjugate, rows])[0], torch.complex(everyone, -everyone))


def keys_may_come_in_another_order_on_each_rank(group: Group) -> None:
    """Such as the losses of tasks by name: `a` would be mixed with `b`, silently where their shapes are the same."""
    names = ["a", "b", 10, 2, "c", "d"]
    turn = group.rank % len(names)
    batch: Any = {name: torch.tensor([float(names.index(name))]) for name in (*names[turn:], *names[:turn])}
    for count in (len(names), 2):  # several tensors are exchanged otherwise than a few
        part = {"first": {name: value for name, value in batch.items() if name in names[:count]}}
        for joined in (gather(group, part), gather_samples(group, part, None)):
            assert list(joined["first"]) == list(part["first"])
            for name, value in joined["first"].items():
                assert value.tolist() == [names.index(name)] * group.size
        for name, value in reduce(group, part)["first"].items():
            assert value.tolist() == [names.index(name)]
    lengths = {name: value.expand(1 + names.index(name)) for name, value in batch.items()}
    assert all(pad_across_processes(group, lengths)[name] is value for name, value in lengths.items())
    text = {name: [str(name)] for name in batch}
    assert gather_samples(group, text, None) == {name: [str(name)] * group.size for name in batch}
    sent = {name: value + group.rank for name, value in batch.items()}
    broadcast(group, sent)
    assert {name: value.item() for name, value in sent.items()} == {name: names.index(name) for name in names}


def gather_refuses_objects(group: Group) -> None:
    with pytest.raises(CollectiveError, match=r"data\['text'\]\[0\], a str.*gather_object"):
        gather(group, {"loss": torch.ones(1), "text": ["a"]})
    with pytest.raises(CollectiveError, match="sparse"):
        reduce(group, torch.ones(2, 2).to_sparse())


def gather_object_joins_lists(group: Group) -> None:
    assert gather_object(group, ["x"] * group.rank + [group.rank]) == [
        entry for r in range(group.size) for entry in ["x"] * r + [r]
    ]
    assert gather_object(group, {"rank": group.rank}) == [{"rank": r} for r in range(group.size)]


def reduce_leaves_its_input_alone(group: Group) -> None:
    data: dict[str, Any] = {
        "a": torch.full((2,), float(group.rank)),
        "b": [torch.tensor(group.rank), torch.tensor(1.0)],
    }
    mean = (group.size - 1) / 2
    total = sum(range(group.size))
    means, sums = reduce(group, data, "mean", debug=True), reduce(group, data, "sum", scale=0.5)
    same(means["a"], torch.full((2,), mean))
    same(means["b"][0], torch.tensor(mean))
    same(means["b"][1], torch.tensor(1.0))
    same(sums["a"], torch.full((2,), total / 2))
    same(sums["b"][0], torch.tensor(total / 2))
    same(reduce(group, data, "max")["b"][0], torch.tensor(group.size - 1))
    same(reduce(group, data, "min")["a"], torch.zeros(2))
    same(data["a"], torch.full((2,), float(group.rank)))


def reduce_none_exchanges_nothing(group: Group) -> None:
    counting = CountingGroup(group)
    mine = torch.tensor([float(group.rank)])
    result = reduce(counting, mine, "none", scale=2.0)
    same(result, 2 * mine)
    assert reduce(counting, mine, "none").data_ptr() != mine.data_ptr()
    assert not counting.calls
    with pytest.raises(CollectiveError, match="'avg'"):
        reduce(group, mine, "avg")  # type: ignore[arg-type]


def reduce_takes_one_exchange_per_dtype(group: Group) -> None:
    counting = CountingGroup(group)
    data = [torch.ones(3), torch.ones(2, 2), torch.tensor(1), torch.tensor([2]), torch.ones(1)]
    result = reduce(counting, data, "sum")
    assert counting.calls == {"all_reduce": 2}
    for before, after in zip(data, result, strict=True):
        same(after, before * group.size)


def broadcast_fills_a_nested_batch(group: Group) -> None:
    last = group.size - 1
    counting = CountingGroup(group)
    data: dict[str, Any] = {
        "a": torch.tensor(group.rank),
        "b": [torch.full((3,), float(group.rank)), torch.empty(0)],
    }
    a = data["a"]
    assert broadcast(counting, data, last) is data
    assert data["a"] is a
    same(a, torch.tensor(last))
    same(data["b"][0], torch.full((3,), float(last)))
    assert counting.calls == ({"broadcast": 1} if group.size > 1 else {})
    objects = [group.rank, {"r": group.rank}]
    assert broadcast_object_list(group, objects, last) is objects
    assert objects == [last, {"r": last}]


def pad_makes_sizes_equal(group: Group) -> None:
    rank, size = group.rank, group.size
    counting = CountingGroup(group)
    data: dict[str, Any] = {"x": torch.ones(rank + 1, 2), "y": [torch.ones(2, rank)], "z": torch.tensor(1)}
    first = pad_across_processes(counting, data)
    assert counting.calls == ({"all_gather": 1} if size > 1 else {})
    same(first["x"], torch.cat([torch.ones(rank + 1, 2), torch.zeros(size - rank - 1, 2)]))
    same(first["y"][0], torch.ones(2, rank))
    assert first["z"] is data["z"]
    last = pad_across_processes(group, data["y"], dim=-1, pad_index=-100, pad_first=True, debug=True)[0]
    same(last, torch.cat([torch.full((2, size - 1 - rank), -100.0), torch.ones(2, rank)], 1))
    same(pad_across_processes(group, torch.ones(2), dim=1), torch.ones(2))
    assert data["x"].shape == (rank + 1, 2)


# 10,007 samples in batches of 16: the last ones differ from rank to rank or hold padding.
NUM_SAMPLES = 10_007


def rounds(size: int, padded_parity: int, batch: int = 16) -> list[tuple[BatchCounts, list[list[int]]]]:
    """Share the samples out in order: per round, the counts and the ids of every rank, padding included.

    Rounds of one parity are padded to full batches, the others have fewer rows where samples run out.
    """
    shared = []
    for index, start in enumerate(range(0, NUM_SAMPLES, batch * size)):
        ids = list(range(start, min(start + batch * size, NUM_SAMPLES)))
        per_rank = [ids[r * batch : (r + 1) * batch] for r in range(size)]
        real = tuple(map(len, per_rank))
        if index % 2 != padded_parity:
            rows = real
        else:
            per_rank = [own + [0] * (batch - len(own)) for own in per_rank]
            rows = (batch,) * size
        shared.append((BatchCounts(rows=rows, real=real), per_rank))
    return shared


def every_sample_is_gathered_once(group: Group) -> None:
    for padded_parity in (0, 1):
        check_samples(group, rounds(group.size, padded_parity))


def check_samples(group: Group, shared: list[tuple[BatchCounts, list[list[int]]]]) -> None:
    seen: dict[str, list[Any]] = {"ids": [], "text": [], "logits": [], "info": [], "names": []}
    # Every tenth round and the last ones: all rounds are the same but for those.
    kept = shared[:-3:10] + shared[-3:]
    for counts, per_rank in kept:
        own = per_rank[group.rank]
        ids = torch.tensor(own, dtype=torch.int64)
        batch = {
            "ids": ids,
            "nested": Output(torch.tensor(1.5), ids.view(-1, 1).float() * torch.ones(1, 3)),
            "text": [f"s{i}" for i in own],
            "info": [{"id": i} for i in own],
            "names": tuple(f"s{i}" for i in own),
        }
        result = gather_samples(group, batch, counts)
        assert list(result) == list(batch)
        seen["ids"] += result["ids"].tolist()
        seen["logits"] += result["nested"].logits[:, 2].tolist()
        brings = sum(1 for rows, real in zip(counts.rows, counts.real, strict=True) if real or not rows)
        same(result["nested"].loss, torch.full((brings,), 1.5))
        seen["text"] += result["text"]
        seen["info"] += [entry["id"] for entry in result["info"]]
        assert isinstance(result["names"], tuple)
        seen["names"] += result["names"]
    expected = [i for counts, own in kept for r, ids in enumerate(own) for i in ids[: counts.real[r]]]
    assert expected[-1] == NUM_SAMPLES - 1
    assert seen["ids"] == seen["logits"] == seen["info"] == expected
    assert seen["text"] == seen["names"] == [f"s{i}" for i in expected]


def uneven_rows_are_exact(group: Group) -> None:
    size, rank = group.size, group.rank
    for rows in (tuple(range(size)), tuple(range(size, 0, -1)), (0,) * size):
        for real in (rows, tuple(max(0, r - 1) for r in rows)):
            ids = torch.arange(rows[rank]) + 10 * rank
            data = {"ids": ids, "flags": ids > 3, "loss": torch.tensor(float(rank))}
            result = gather_samples(group, data, BatchCounts(rows=rows, real=real), debug=True)
            expected = [10 * r + i for r in range(size) for i in range(real[r])]
            assert result["ids"].tolist() == expected
            assert result["flags"].tolist() == [i > 3 for i in expected]
            brings = [r for r in range(size) if real[r] or not rows[r]]
            same(result["loss"], torch.tensor(brings).float())


def what_is_not_filled_up_is_kept_whole(group: Group) -> None:
    size, rank = group.size, group.rank
    # Nobody has padding, or only the last rank, which has nothing else.
    for real in ((4,) * size, (4,) * (size - 1) + (0,)):
        some = sum(1 for r in real if r)
        data = {
            "loss": torch.tensor(float(rank)),
            "hist": torch.full((3,), rank),
            "nodes": torch.full((rank + 4, 2), rank),
            "views": torch.full((8, 3), rank),
            "step": rank,
            "name": f"r{rank}",
            "none": None,
            "tags": [f"t{rank}"],
            "array": np.full((rank + 1, 2), rank),
        }
        result = gather_samples(group, data, BatchCounts(rows=(4,) * size, real=real), debug=True)
        same(result["loss"], torch.arange(some).float())
        same(result["hist"], torch.arange(some).repeat_interleave(3))
        assert result["nodes"][:, 1].tolist() == [r for r in range(some) for _ in range(r + 4)]
        assert len(result["views"]) == 8 * some
        assert result["step"] == list(range(some))
        assert result["name"] == [f"r{r}" for r in range(some)]
        assert result["none"] == [None] * some
        assert result["tags"] == [f"t{r}" for r in range(some)]
        assert result["array"][:, 0].tolist() == [r for r in range(some) for _ in range(r + 1)]


def what_cannot_be_cut_is_named(group: Group) -> None:
    counts = BatchCounts(rows=(4,) * group.size, real=(4,) * (group.size - 1) + (1,))
    for value in (torch.ones(8, 3), torch.ones(1, 4), ["a"] * 5, np.ones(3)):
        for use_object in (False, True):
            with pytest.raises(CollectiveError, match=r"data\['out'\] is a .*with \["):
                gather_samples(group, {"fits": torch.ones(4), "out": value}, counts, use_object)
    # One rank's own number of rows that is right by chance.
    if group.size > 1:
        with pytest.raises(CollectiveError, match="cannot be cut"):
            gather_samples(group, torch.ones(4 + group.rank), counts)
    # The group is still in step.
    same(gather_samples(group, torch.ones(4), counts), torch.ones(4 * group.size - 3))


def shapes_that_do_not_fit_are_named(group: Group) -> None:
    counts = BatchCounts(rows=(4,) * group.size, real=(4,) * group.size)
    rank, size = group.rank, group.size
    packed = torch.full((1, rank + 2), rank)
    padded = gather_samples(group, packed, counts, pad_index=-100)
    assert padded.shape == (size, size + 1)
    assert (padded == -100).sum() == size * (size - 1) // 2
    if size == 1:
        return
    for value, match in (
        (packed, r"shapes \(1, 2\), \(1, 3\).* pad_index"),
        (torch.ones(4, 2, rank + 1), r"shapes .*\(4, 2, 1\)"),
        (torch.ones(4, dtype=torch.int32 if rank else torch.int64), "torch.int32"),
        (np.ones((4, rank + 1)), r"shapes \(4, 1\), \(4, 2\)"),
    ):
        with pytest.raises(CollectiveError, match=match):
            gather_samples(group, {"x": value}, counts)
    # A filler of another length is left out before anything has to fit.
    counts = BatchCounts(rows=(4,) * size, real=(4,) + (0,) * (size - 1))
    same(gather_samples(group, packed, counts), torch.zeros(1, 2, dtype=torch.int64))


def lists_of_tensors_are_told_apart(group: Group) -> None:
    size, rank = group.size, group.rank
    counts = BatchCounts(rows=(3,) * size, real=(3,) * (size - 1) + (2,))
    boxes = [torch.full((i + 1, 4), 10 * rank + i) for i in range(3)]
    expected = [10 * r + i for r in range(size) for i in range(3)][:-1]
    for entries in (boxes, [(box, box.sum()) for box in boxes]):
        result = gather_samples(group, {"boxes": entries}, counts, debug=True)["boxes"]
        found = [entry[0] if isinstance(entry, tuple) else entry for entry in result]
        assert [int(box[0, 0]) for box in found] == expected
        assert [len(box) for box in found] == [value % 10 + 1 for value in expected]
    # As torchvision's collate makes targets.
    targets = gather_samples(group, tuple({"box": box} for box in boxes), counts)
    assert isinstance(targets, tuple)
    assert [int(target["box"][0, 0]) for target in targets] == expected
    # What a rank is given to take part with may hold another number of samples.
    fewer = BatchCounts(rows=(3,) * size, real=(3,) * (size - 1) + (3 if size == 1 else 0,))
    entries = boxes if rank < size - 1 or size == 1 else boxes[:2]
    assert len(gather_samples(group, entries, fewer)) == 3 * max(1, size - 1)
    # Structure: each tensor has a row per sample. Of two kinds, it is structure whatever its length.
    logits = torch.full((3, 2), rank)
    result = gather_samples(group, [logits, logits + 1], counts)
    assert [len(part) for part in result] == [3 * size - 1] * 2
    result = gather_samples(group, [logits, logits[:, 0], boxes], counts)
    assert [len(part) for part in result] == [3 * size - 1] * 3
    result = gather_samples(group, {"deep": [(logits, logits)]}, counts)
    assert [len(part) for part in result["deep"][0]] == [3 * size - 1] * 2
    if size == 1:
        return
    for value, match in (
        ([logits] * 3, "is a list with as many entries as the batch has samples, whose tensors have as many rows"),
        ([torch.tensor(1.0)] * 3, "Stack it into one tensor"),
        ([torch.ones(5, 2)] * 2, "neither as many entries"),
        (tuple(torch.ones(5, 2) for _ in range(3)), "Make it a list if each tensor belongs to one sample"),
    ):
        with pytest.raises(CollectiveError, match=match):
            gather_samples(group, {"x": value}, counts)
    # Where one rank alone brings something, there is nothing to tell.
    only = (1,) + (0,) * (size - 1)
    for counted in (True, False):
        result = gather_samples(group, [torch.full((1, 4), rank)], BatchCounts((1,) * size, only, counted))
        assert [box.tolist() for box in result] == [[[0] * 4]]
    # Some rank's own may look like structure by chance; the others' tell.
    counts = BatchCounts(rows=(2,) * size, real=(2,) * size)
    result = gather_samples(group, [torch.full((rank + 2, 4), rank)] * 2, counts)
    assert [len(box) for box in result] == [r + 2 for r in range(size) for _ in range(2)]


def what_nobody_counted_is_kept_whole(group: Group) -> None:
    size, rank = group.size, group.rank
    for real in ((1,) * size, (1,) * (size - 1) + (0,)):
        some = sum(real)
        counts = BatchCounts(rows=(1,) * size, real=real, counted=False)
        data = {
            "packed": torch.full((1, rank + 1), rank),
            "nodes": torch.full((rank + 1, 2), rank),
            "pair": (torch.full((4,), rank), torch.tensor(rank)),
            "targets": [{"box": torch.full((rank, 4), rank)} for _ in range(rank + 1)],
            "names": [f"r{rank}"] * 3,
        }
        result = gather_samples(group, data, counts, pad_index=-100, debug=True)
        assert result["packed"][:, 0].tolist() == list(range(some))
        assert result["nodes"][:, 0].tolist() == [r for r in range(some) for _ in range(r + 1)]
        assert result["pair"][0].tolist() == [r for r in range(some) for _ in range(4)]
        assert result["pair"][1].tolist() == list(range(some))
        assert [len(target["box"]) for target in result["targets"]] == [r for r in range(some) for _ in range(r + 1)]
        assert result["names"] == [f"r{r}" for r in range(some) for _ in range(3)]
    if size > 1:
        counts = BatchCounts(rows=(1,) * size, real=(1,) * size, counted=False)
        with pytest.raises(
            CollectiveError, match=r"data\['x'\] is a list of tensors, from a loader that makes its batches"
        ):
            gather_samples(group, {"x": [torch.ones(2)] * 2}, counts)


def one_row_is_one_sample(group: Group) -> None:
    counts = BatchCounts(rows=(1,) * group.size, real=(1,) + (0,) * (group.size - 1))
    same(gather_samples(group, torch.tensor([group.rank + 5]), counts), torch.tensor([5]))
    same(gather_samples(group, torch.tensor(group.rank), counts), torch.arange(1))


def without_counts_nothing_is_cut(group: Group) -> None:
    result = gather_samples(group, (torch.tensor([group.rank]), ["a"], 3), None)
    same(result[0], torch.arange(group.size))
    assert result[1] == ["a"] * group.size
    assert result[2] == [3] * group.size
    assert gather_samples(group, [group.rank], None) == list(range(group.size))


def samples_as_objects_may_differ_in_shape(group: Group) -> None:
    size, rank = group.size, group.rank
    counts = BatchCounts(rows=(2,) * size, real=(2,) * (size - 1) + (1,))
    boxes = [torch.full((rank + 1, 4), i) for i in range(2)]
    joined = gather_samples(group, boxes, counts, use_gather_object=True)
    assert [tuple(box.shape) for box in joined] == [(r + 1, 4) for r in range(size) for _ in range(2)][:-1]
    logits = gather_samples(group, {"x": torch.ones(2, rank + 1)}, counts, use_gather_object=True, debug=True)
    assert [tuple(x.shape) for x in logits["x"]] == [(counts.real[r], r + 1) for r in range(size)]
    targets = gather_samples(group, [{"box": torch.ones(rank, 4)} for _ in range(2)], counts)
    assert [len(t["box"]) for t in targets] == [r for r in range(size) for _ in range(2)][:-1]
    array = gather_samples(group, {"a": np.arange(2) + 2 * rank}, counts)
    assert array["a"].tolist() == list(range(2 * size))[:-1]


def gathering_samples_takes_few_exchanges(group: Group) -> None:
    size, rank = group.size, group.rank
    counting = CountingGroup(group)
    even = BatchCounts(rows=(2,) * size, real=(2,) * (size - 1) + (1,))
    data = {
        "a": torch.ones(2),
        "b": [torch.ones(2, 3).half(), torch.tensor(1)],
        "c": torch.tensor([True] * 2),
    }
    gather_samples(counting, data, even)
    # Their shapes, in host memory, and the tensors.
    assert counting.calls == ({"all_gather": 2} if size > 1 else {})
    gather_samples(counting, {**data, "t": ["x", "y"], "n": 3}, even)
    # With objects the shapes travel along.
    assert counting.calls == ({"all_gather": 3} if size > 1 else {}) | {"all_gather_object": 1}
    uneven = BatchCounts(rows=tuple(range(size)), real=tuple(range(size)))
    counting.calls.clear()
    gather_samples(counting, [torch.ones(rank), torch.ones(rank, 2)], uneven)
    assert counting.calls["all_gather"] == (2 if size > 1 else 0)


def the_first_goes_first(group: Group) -> None:
    last = group.size - 1
    with main_process_first(group, group.rank == last):
        began = time.monotonic()
        if group.rank == last:
            time.sleep(0.05)
        ended = time.monotonic()
    times = group.all_gather_object((began, ended))
    assert all(times[r][0] >= times[last][1] for r in range(last))


def a_failing_first_fails_the_others(group: Group) -> None:
    expected = (
        (RuntimeError, "disk full")
        if group.rank == 0
        else (CollectiveError, "Rank 0 went first and failed: RuntimeError: disk full")
    )

    def fail() -> None:
        raise RuntimeError("disk full" if group.rank == 0 else "the others must not get here")

    with pytest.raises(expected[0], match=f"(?s){expected[1]}"), main_process_first(group, group.rank == 0):
        fail()
    assert group.all_gather_object(1) == [1] * group.size


def a_value_that_cannot_be_pickled_fails_everywhere(group: Group) -> None:
    if group.size == 1:
        return
    odd: Any = (lambda: None) if group.rank == 1 else "fine"
    with pytest.raises(CollectiveError, match="Rank 1 passed an object that cannot be pickled"):
        group.all_gather_object(odd)
    assert group.all_gather_object(2) == [2] * group.size


def debug_names_the_odd_rank(group: Group) -> None:
    if group.size == 1:
        return
    odd = group.size - 1
    usual = "rank 0 passes" if group.size == 2 else "ranks 0-1 pass"
    is_odd = group.rank == odd

    def refused(message: str, call: Callable[[], object]) -> None:
        with pytest.raises(CollectiveError, match=message):
            call()

    shapes = {"logits": [torch.ones((3 if is_odd else 4), 5)]}
    refused(rf"Rank {odd} passes data\['logits'\]\[0\] of shape \(3, 5\) where {usual} \(4, 5\)",
            lambda: gather(group, shapes, debug=True))  # fmt: skip
    dtypes = torch.ones(2, dtype=torch.float64 if is_odd else torch.float32)
    refused(rf"Rank {odd} passes data as torch.float64 on c.* where {usual} torch.float32",
            lambda: reduce(group, dtypes, debug=True))  # fmt: skip
    keys = {"a": torch.ones(1)} | ({"b": torch.ones(1)} if is_odd else {})
    refused(rf"Rank {odd} passes data\['b'\] of shape \(1,\) where {usual} nothing",
            lambda: broadcast(group, keys, debug=True))  # fmt: skip
    kinds = {"a": "text" if is_odd else torch.ones(1)}
    refused(f"Rank {odd} passes .* as a str", lambda: pad_across_processes(group, kinds, debug=True))
    counts = BatchCounts(rows=(2,) * group.size, real=(2,) * group.size)
    widths = torch.ones(2, 4 if is_odd else 3)
    refused(rf"Rank {odd} passes data of shape \(\*, 4\) where {usual} \(\*, 3\)",
            lambda: gather_samples(group, widths, counts, debug=True))  # fmt: skip
    call = (lambda: reduce(group, torch.ones(1), "sum", debug=True)) if is_odd else (
        lambda: gather(group, torch.ones(1), debug=True)
    )  # fmt: skip
    refused(f"Rank {odd} is in reduce.* where rank.* in gather", call)
    assert group.all_gather_object(3) == [3] * group.size


def counts_of_other_ranks_are_refused(group: Group) -> None:
    rows = (1,) * (group.size + 1)
    with pytest.raises(CollectiveError, match=f"Counts for {group.size + 1} ranks"):
        gather_samples(group, torch.ones(1), BatchCounts(rows=rows, real=rows))


CASES: dict[str, Callable[[Group], None]] = {
    case.__name__: case
    for case in (
        all_gather_stacks_every_dtype, all_gather_takes_odd_shapes, started_gathers_may_overlap,
        all_gather_does_not_alias, all_reduce_works_in_place, all_reduce_of_integers, all_reduce_of_bool,
        all_reduce_takes_odd_tensors, all_reduce_refuses, broadcast_overwrites_in_place, objects_travel,
        started_scatters_may_overlap, gather_keeps_the_structure,
        gather_takes_one_exchange, a_few_tensors_of_any_kind, a_few_tensors_may_lie_otherwise_on_each_rank,
        keys_may_come_in_another_order_on_each_rank,
        large_tensors_travel_alone, gather_refuses_objects, gather_object_joins_lists,
        reduce_leaves_its_input_alone, reduce_none_exchanges_nothing, reduce_takes_one_exchange_per_dtype,
        broadcast_fills_a_nested_batch, pad_makes_sizes_equal, every_sample_is_gathered_once,
        uneven_rows_are_exact, what_is_not_filled_up_is_kept_whole, what_cannot_be_cut_is_named,
        shapes_that_do_not_fit_are_named, lists_of_tensors_are_told_apart, what_nobody_counted_is_kept_whole,
        one_row_is_one_sample,
        without_counts_nothing_is_cut, samples_as_objects_may_differ_in_shape,
        gathering_samples_takes_few_exchanges, the_first_goes_first, a_failing_first_fails_the_others,
        a_value_that_cannot_be_pickled_fails_everywhere, debug_names_the_odd_rank,
        counts_of_other_ranks_are_refused,
    )
}  # fmt: skip
