"""Small models that tests train."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 67


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention(self.norm1(x)).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class TinyTransformer(nn.Module):
    """A decoder with tied embeddings, no dropout, and a vocabulary that divides by no number of ranks."""

    def __init__(self, width: int = 16, layers: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def make_tokens(samples: int, length: int = 9, seed: int = 1) -> Tensor:
    """Tokens [samples, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (samples, length), generator=generator)


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of each next token [batch, length - 1]."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), tokens[:, 1:], reduction="none")


def tanh_model(seed: int = 0) -> nn.Sequential:
    """A model of 6 inputs and 1 output, for tests of what a script does to weights and gradients."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def tanh_batches(count: int) -> Tensor:
    """Batches of 4 samples for `tanh_model`: shape [count, 4, 6]."""
    return torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(1))
