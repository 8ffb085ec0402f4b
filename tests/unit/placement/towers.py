"""Small models with everything that placement must get right: tied weights, buffers, parameters beside modules."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """A layer with a parameter and buffers of its own; `reads_inner` uses a submodule's weight without calling it."""

    shift: torch.Tensor
    mask: torch.Tensor

    def __init__(self, width: int, reads_inner: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width, bias=False)
        self.scale = nn.Parameter(torch.rand(width))
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("shift", torch.randn(width))
        self.register_buffer("mask", torch.ones(width), persistent=False)
        self.reads_inner = reads_inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x @ self.inner.weight.T + self.inner.bias if self.reads_inner else self.inner(x)
        y: torch.Tensor = self.norm(self.outer(hidden.relu()) * self.scale + x)
        return y * self.mask + self.shift


class Tower(nn.Module):
    """Blocks between tied embeddings and a head."""

    def __init__(self, width: int = 8, blocks: int = 4, reads_inner: bool = False, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.blocks = nn.ModuleList([Block(width, reads_inner) for _ in range(blocks)])
        self.head = nn.Linear(width, 16, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


def tower(seed: int = 0, **settings: bool | int) -> Tower:
    """A model in evaluation mode, the same each time."""
    torch.manual_seed(seed)
    return Tower(**settings).eval()  # type: ignore[arg-type]


def ids() -> torch.Tensor:
    """What the models of `tower` take."""
    return torch.tensor([1, 5, 9, 2, 15])
