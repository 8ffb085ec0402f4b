"""Batches as people make them: what belongs to a sample is not always a row of a tensor.

Each collator takes the numbers of samples, and `TELLS` reads them back out of what was gathered.
"""

from __future__ import annotations

from collections import Counter, UserDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from collections.abc import Callable


class Numbered(Dataset[int]):
    """Samples that are their own numbers."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if index >= self.count:
            raise IndexError
        return index


def parts(number: int) -> int:
    """How many boxes, tokens or nodes a sample has."""
    return number % 3 + 1


def repeated(number: int) -> torch.Tensor:
    return torch.full((parts(number),), number)


class Encoded(UserDict[str, Any]):
    """A mapping that is no dict, as tokenizers return."""


def as_targets(samples: list[int]) -> Any:
    return [{"boxes": torch.full((parts(i), 4), float(i)), "cls": repeated(i)} for i in samples]


def as_ragged(samples: list[int]) -> Any:
    return {"f": [repeated(i) for i in samples]}


def as_arrays(samples: list[int]) -> Any:
    return {"f": [np.full((parts(i), 2), i) for i in samples], "n": np.array(samples)}


def as_pairs(samples: list[int]) -> Any:
    return [(f"s{i}", i, repeated(i)) for i in samples]


def as_strings(samples: list[int]) -> Any:
    return tuple(f"s{i}" for i in samples)


def as_target_tuple(samples: list[int]) -> Any:
    return tuple({"boxes": repeated(i)} for i in samples)


def as_encoded(samples: list[int]) -> Any:
    return Encoded(ids=torch.tensor(samples), text=[f"s{i}" for i in samples])


def as_packed(samples: list[int]) -> Any:
    """One row of all tokens, [1, T]."""
    return torch.cat([repeated(i) for i in samples])[None]


def as_graph(samples: list[int]) -> Any:
    nodes = torch.cat([repeated(i) for i in samples])[:, None]
    # Other numbers of nodes than of graphs: at least one graph has two.
    return {"nodes": nodes, "graphs": torch.tensor(samples)}


def as_views(samples: list[int]) -> Any:
    """Two rows a sample, [2B, 3]."""
    return torch.tensor([[i, view, 0] for view in range(2) for i in samples])


def _distinct(values: torch.Tensor) -> list[int]:
    """The numbers of samples, each of which is there as often as it has parts."""
    counted = Counter(int(n) for n in values)
    assert all(count == parts(number) for number, count in counted.items())
    return sorted(counted)


def _views(values: torch.Tensor) -> list[int]:
    counted = Counter(int(n) for n in values[:, 0])
    assert set(counted.values()) == {2}
    return sorted(counted)


def _each(boxes: Any) -> list[int]:
    for box in boxes:
        assert len(box) == parts(int(box.reshape(-1)[0]))
        assert (box == box.reshape(-1)[0]).all()
    return [int(box.reshape(-1)[0]) for box in boxes]


def _same(*told: list[int]) -> list[int]:
    assert all(one == told[0] for one in told)
    return told[0]


def _number(text: str) -> int:
    return int(text[1:])


# What a batch is made of, and which samples a gathered batch holds.
BY_SAMPLE: dict[str, tuple[Callable[[list[int]], Any], Callable[[Any], list[int]]]] = {
    "targets": (as_targets, lambda g: _same(_each([t["boxes"] for t in g]), _each([t["cls"] for t in g]))),
    "ragged": (as_ragged, lambda g: _each(g["f"])),
    "arrays": (as_arrays, lambda g: _same(_each(g["f"]), g["n"].tolist())),
    "pairs": (as_pairs, lambda g: _same([_number(p[0]) for p in g], [p[1] for p in g], _each([p[2] for p in g]))),
    "strings": (as_strings, lambda g: [_number(text) for text in g]),
    "target tuple": (as_target_tuple, lambda g: _each([target["boxes"] for target in g])),
    "encoded": (as_encoded, lambda g: _same(g["ids"].tolist(), [_number(text) for text in g["text"]])),
}
# These cannot be cut once they are collated.
WHOLE: dict[str, tuple[Callable[[list[int]], Any], Callable[[Any], list[int]]]] = {
    "packed": (as_packed, lambda g: _distinct(g[g >= 0])),
    "graph": (as_graph, lambda g: _same(_distinct(g["nodes"][:, 0]), sorted(g["graphs"].tolist()))),
    "views": (as_views, _views),
}
