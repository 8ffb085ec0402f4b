"""A tiny Llama made from a configuration, and text from the standard library's sources, byte by byte."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

VOCABULARY = 260


def pieces(count: int, seed: int = 0, longest: int = 24) -> list[list[int]]:
    """Pieces of different lengths of a real text, as tokens."""
    text = inspect.getsource(textwrap).encode()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - longest, (count,), generator=generator).tolist()
    lengths = torch.randint(longest // 3, longest + 1, (count,), generator=generator).tolist()
    return [[byte + 3 for byte in text[start : start + length]] for start, length in zip(starts, lengths, strict=True)]


class Pieces(Dataset[dict[str, Any]]):
    """Pieces of text as rows."""

    def __init__(self, count: int, seed: int = 0, longest: int = 24) -> None:
        self.rows = pieces(count, seed, longest)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.rows[index]}


class PieceStream(IterableDataset[dict[str, Any]]):
    """The same as a stream."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.rows = pieces(count, seed)

    def __iter__(self) -> Any:
        return iter([{"input_ids": row} for row in self.rows])


def padded_evenly(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate rows to batches of one width, which rank 0 can send as one."""
    return padded(rows, width=24)


def padded(rows: list[dict[str, Any]], width: int = 0) -> dict[str, torch.Tensor]:
    """Collate rows; padding has no label."""
    longest = max(width, *(len(row["input_ids"]) for row in rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        tokens[number, :length] = labels[number, :length] = torch.tensor(row["input_ids"])
        mask[number, :length] = 1
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def llama(dropout: float = 0.0, **changes: Any) -> Any:
    """A Llama of two small layers, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attention_dropout": dropout,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**shape))


def saved_weights(folder: str) -> float:
    """One number for all weights that were saved to a folder, as files in safetensors' format."""
    from pathlib import Path

    from safetensors.torch import load_file

    total = 0.0
    for path in sorted(Path(folder).glob("*.safetensors")):
        for number, (_, tensor) in enumerate(sorted(load_file(path).items()), start=1):
            total += number * float(tensor.double().sum() + tensor.double().abs().sum())
    return total
