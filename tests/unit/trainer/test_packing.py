"""Which samples share a row, and what the collator makes of it."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import IterableDataset

from paceline.checkpoint import from_plain, to_plain
from paceline.data.reading_state import SeededCollate
from paceline.environment.object_state import OwnGenerators
from paceline.errors import ConfigError, DataError, PrepareError
from paceline.trainer import Trainer, TrainingArguments
from paceline.trainer.batches.collate import Columns
from paceline.trainer.batches.packing import PackedSet, PackedStream, PackingCollator, pack, pack_dataset

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_every_sample_is_in_one_row_and_none_is_too_full(seed: int, in_order: bool) -> None:
    chooser = random.Random(seed)
    lengths = [chooser.randint(0 if seed == 3 else 1, 100) for _ in range(2000)]
    order = list(range(2000))
    chooser.shuffle(order)
    rows = pack(lengths, order, 100, in_order=in_order)
    assert sorted(i for row in rows for i in row) == list(range(2000))
    assert all(sum(lengths[i] for i in row) <= 100 for row in rows)
    if in_order:
        assert [i for row in rows for i in row] == order
    else:
        assert len(rows) * 100 < 1.02 * sum(lengths) + 100, "hardly a token is left over"


def sample(start: int, length: int, **more: Any) -> dict[str, Any]:
    return {"input_ids": list(range(start, start + length)), **more}


def test_a_row_has_positions_and_no_target_across_sequences() -> None:
    batch = PackingCollator(8)([[sample(10, 3), sample(20, 2)], [sample(30, 8)]])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 21, 0, 0, 0], [*range(30, 38)]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [*range(8)]]
    assert batch["labels"].tolist() == [[-100, 11, 12, -100, 21, -100, -100, -100], [-100, *range(31, 38)]]


def test_labels_masks_and_other_columns() -> None:
    first = sample(10, 4, labels=[-100, -100, 12, -100], attention_mask=[1, 1, 1, 0], token_type_ids=[0, 1, 1, 0])
    second = sample(20, 2, labels=[20, 21], token_type_ids=[1, 1], name="text", weight=0.5, pair=[1, 2])
    first |= {"name": "four", "weight": 1.0, "pair": [3, 4]}
    batch = PackingCollator(6, frozenset({"input_ids", "token_type_ids"}))([[first, second]])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 21, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 12, -100, 21, -100]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1, 1, 1, 0]]
    assert set(batch) == {"input_ids", "labels", "position_ids", "token_type_ids"}


def test_flat_rows_have_limits() -> None:
    batch = PackingCollator(6, flat=True)([[sample(10, 3), sample(20, 2)], [sample(30, 6)]])
    assert batch["input_ids"].shape == (1, 12)
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 12]
    assert batch["max_length_q"] == 6
    assert batch["cu_seq_lens_q"].dtype == torch.int32


class Stream(IterableDataset[dict[str, Any]]):
    """Sequences of many lengths; `at` is its position."""

    def __init__(self, count: int = 200) -> None:
        self.count, self.at = count, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start, self.at = self.at, 0
        for i in range(start, self.count):
            self.at = i + 1
            yield sample(100 * i, 1 + (i * 37) % 50)
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def starts(row: list[Any]) -> list[int]:
    return [int(part["input_ids"][0]) for part in row]


def test_a_stream_is_packed_while_it_is_read_and_resumes_anywhere() -> None:
    packed: Any
    packed, length = pack_dataset(Stream(), 64, shuffle=True, seed=0, length_column="length")
    assert length == 64
    rows = [starts(row) for row in packed]
    assert sorted(start for row in rows for start in row) == [100 * i for i in range(200)]
    assert len(rows) * 64 < 1.1 * sum(1 + (i * 37) % 50 for i in range(200))
    assert [starts(row) for row in packed] == rows, "the next epoch starts anew"
    for stop in (0, 1, 17, len(rows) - 3, len(rows)):
        first: Any = pack_dataset(Stream(), 64, shuffle=True, seed=0, length_column="length")[0]
        reading = iter(first)
        before = [starts(next(reading)) for _ in range(stop)]
        state = first.state_dict()
        second: Any = pack_dataset(Stream(), 64, shuffle=True, seed=0, length_column="length")[0]
        second.load_state_dict(state)
        assert before + [starts(row) for row in second] == rows
        assert [starts(row) for row in second] == rows, "and the epoch after it"


@pytest.mark.parametrize("left_over", [40, 3, 1])
def test_a_stream_that_was_left_within_an_epoch_starts_anew(left_over: int) -> None:
    samples = [{"input_ids": [100 * i] * (1 + (i * 37) % 50)} for i in range(200)]
    packed: Any = PackedStream(samples, 64)
    rows = [starts(row) for row in packed]
    reading = iter(packed)
    for _ in range(len(rows) - left_over):
        next(reading)
    del reading
    assert [starts(row) for row in packed] == rows


class Texts(Stream):
    """Has texts beside its tokens."""

    def __iter__(self) -> Any:
        return ({**sample, "text": "abc", "words": ["a", "b"], "none": None} for sample in super().__iter__())


def test_columns_of_text_are_in_the_state_of_a_stream() -> None:
    first: Any = pack_dataset(Texts(), 64, shuffle=True, seed=0, length_column="length")[0]
    rows = [starts(row) for row in first]
    reading = iter(first)
    before = [starts(next(reading)) for _ in range(9)]
    state = from_plain(json.loads(json.dumps(to_plain(first.state_dict(), "stream"))))
    second: Any = pack_dataset(Texts(), 64, shuffle=True, seed=0, length_column="length")[0]
    second.load_state_dict(state)
    assert second.state_dict()["open"], "also before the first row is read"
    rest = list(second)
    assert before + [starts(row) for row in rest] == rows
    assert rest[0][0]["text"] == "abc"


class Drawing:
    """Masks targets by a generator of its own."""

    def __init__(self) -> None:
        self.source = random.Random(1)

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [index] * 5, "labels": [self.source.randrange(50) for _ in range(5)]}


def test_generators_inside_a_packed_set_are_found() -> None:
    packed: Any = pack_dataset(Drawing(), 12, shuffle=True, seed=0, length_column="length")[0]
    assert OwnGenerators({"dataset": packed})
    assert OwnGenerators({"collate_fn": SeededCollate(Columns(lambda samples: packed[0], frozenset()))})


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    long = [sample(0, 3), sample(0, 70)]
    with pytest.raises(DataError, match="Sample 1 has 70 tokens, and packing_length is 64"):
        pack_dataset(long, 64, shuffle=True, seed=0, length_column="length")
    with pytest.raises(DataError, match="A sample of the stream has 38 tokens"):
        list(PackedStream(Stream(), 30))
    with pytest.raises(DataError, match="Set packing_length"):
        pack_dataset(Stream(), None, shuffle=True, seed=0, length_column="length")
    with pytest.raises(DataError, match="a sample has text"):
        list(PackedStream([{"text": "x"}], 30))
    with pytest.raises(DataError, match=r"shape \(1, 4\)"):
        list(PackedStream([{"input_ids": torch.ones(1, 4)}], 30))
    packed, length = pack_dataset(long, None, shuffle=False, seed=0, length_column="length")
    assert isinstance(packed, PackedSet)
    assert (len(packed), length) == (2, 70)
    with pytest.raises(ConfigError, match="without packing"):
        TrainingArguments(packing_length=5)
    with pytest.raises(ConfigError, match="all packed rows have one length"):
        TrainingArguments(packing=True, train_sampling_strategy="group_by_length")
    arguments = TrainingArguments(output_dir=str(tmp_path), packing=True, use_cpu=True)
    with pytest.raises(ConfigError, match="takes no position_ids"):
        Trainer(torch.nn.Linear(2, 2), arguments, train_dataset=long)


def test_a_model_whose_sequences_see_each_other_is_refused(tmp_path: Path) -> None:
    class Sums(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(100, 4)
            self.head = torch.nn.Linear(4, 100)

        def forward(
            self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor
        ) -> dict[str, torch.Tensor]:
            logits = self.head(self.embedding(input_ids).cumsum(1))[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            return {"loss": loss}

    data = [sample(i, 5) for i in range(20)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), packing=True, packing_length=16, use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    with pytest.raises(PrepareError, match="Sums lets a sequence see the ones before it"):
        Trainer(Sums(), arguments, train_dataset=data).train()
