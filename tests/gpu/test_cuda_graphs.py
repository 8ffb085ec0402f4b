"""CUDA graphs of compiled blocks train as eager blocks do, whatever a script does between steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from paceline import Accelerator
from paceline.config import TorchDynamoPlugin
from paceline.strategies import cuda_graphs
from tests.support.compilation import compiling_at_once
from tests.support.models import TinyTransformer, make_tokens, token_losses
from tests.support.ranks import run_on_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

STEPS = 34


def without_delay() -> AbstractContextManager[None]:
    """Compile and replay as early as possible, whatever it gains."""
    return compiling_at_once(_WORTHWHILE_GRAPHS=1e9)


class Recomputing(TinyTransformer):
    """Its blocks are computed again in the backward."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) * self.scale
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class Keeping(TinyTransformer):
    """Keeps what its blocks return, as a script does that looks at activations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.kept: list[torch.Tensor] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
            self.kept.append(x.detach())
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def plain_step(accelerator: Any, model: Any, optimizer: Any, index: int, length: int = 9) -> torch.Tensor:
    """Accumulates over two batches."""
    ranks, rank = accelerator.num_processes, accelerator.process_index
    losses = []
    for part in range(2):
        tokens = make_tokens(4 * ranks, length, seed=2 * index + part)[rank::ranks].to(accelerator.device)
        with accelerator.accumulate(model):
            loss = token_losses(model(tokens), tokens).mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def by_hand_step(accelerator: Any, model: Any, optimizer: Any, index: int) -> torch.Tensor:
    """Two forwards, then their backwards, and only then a step."""
    losses = []
    for part in range(2):
        tokens = make_tokens(4, seed=2 * index + part).to(accelerator.device)
        losses.append(token_losses(model(tokens), tokens).mean())
    for loss in losses:
        accelerator.backward(loss / 2)
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack([loss.detach() for loss in losses]).mean()


def interleaved_step(accelerator: Any, model: Any, optimizer: Any, index: int) -> torch.Tensor:
    """A forward between two backwards, as with a generator and a discriminator."""
    first, second, third = (make_tokens(4, seed=3 * index + part).to(accelerator.device) for part in range(3))
    waiting = token_losses(model(first), first).mean()
    accelerator.backward(token_losses(model(second), second).mean())
    other = token_losses(model(third), third).mean()
    accelerator.backward(waiting)
    accelerator.backward(other)
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack([waiting.detach(), other.detach()]).mean()


def evaluating_step(accelerator: Any, model: Any, optimizer: Any, index: int) -> torch.Tensor:
    """An evaluation between backward and step."""
    tokens = make_tokens(4, seed=index).to(accelerator.device)
    loss = token_losses(model(tokens), tokens).mean()
    accelerator.backward(loss)
    model.eval()
    with torch.no_grad():
        model(make_tokens(3, 5 + index % 3).to(accelerator.device))
    model.train()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def changing_step(accelerator: Any, model: Any, optimizer: Any, index: int) -> torch.Tensor:
    """Each step has batches of another length."""
    return plain_step(accelerator, model, optimizer, index, 5 + index)


def train(
    make: Callable[..., Any], step: Callable[..., torch.Tensor], strategy: str = "single", **settings: Any
) -> tuple[list[float], str, Any]:
    """Losses, what is said about the compiler, and the model."""
    accumulation = 2 if step in (plain_step, changing_step) else 1
    accelerator = Accelerator(strategy=strategy, gradient_accumulation_steps=accumulation, **settings)
    model: Any = make(width=64)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.003)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = [step(accelerator, model, optimizer, index) for index in range(STEPS)]
    found = [float(accelerator.reduce(loss, "mean")) for loss in losses]
    return found, accelerator.describe(), accelerator.unwrap_model(model)


CASES: dict[str, tuple[Any, Any, str]] = {
    "accumulated": (TinyTransformer, plain_step, "replayed as CUDA graphs; a step"),
    "two forwards before a backward": (TinyTransformer, by_hand_step, "replayed as CUDA graphs; a step"),
    "evaluations between": (TinyTransformer, evaluating_step, "replayed as CUDA graphs; a step"),
    "a forward between two backwards": (TinyTransformer, interleaved_step, "not replayed as CUDA graphs: a forward"),
    "shapes that change": (TinyTransformer, changing_step, "compiled by"),
    "outputs that are kept": (Keeping, plain_step, "replayed as CUDA graphs; a step"),
    "activations computed again": (Recomputing, plain_step, "not replayed as CUDA graphs: activations"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_graphs_change_no_number(case: str) -> None:
    run_on_ranks(1, in_case, case, device="cuda", timeout=240)


def in_case(case: str) -> None:
    make, step, words = CASES[case]
    plain, _, expected = train(make, step, dynamo_backend="no")
    with without_delay():
        losses, said, model = train(make, step)
    assert words in said, said
    assert losses == pytest.approx(plain, abs=2e-4)
    for one, other in zip(getattr(model, "kept", []), getattr(expected, "kept", []), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=1e-3)


@pytest.mark.gpus2
def test_graphs_change_no_number_under_ddp() -> None:
    run_on_ranks(2, under_ddp, device="cuda", timeout=240)


def under_ddp() -> None:
    plain, _, _ = train(TinyTransformer, plain_step, "ddp", dynamo_backend="no")
    with without_delay():
        losses, said, _ = train(TinyTransformer, plain_step, "ddp")
    assert "replayed as CUDA graphs; a step" in said, said
    assert losses == pytest.approx(plain, abs=2e-4)


@pytest.mark.gpu
def test_what_is_not_copied_is_overwritten() -> None:
    run_on_ranks(1, without_copies, device="cuda", timeout=240)


def without_copies() -> None:
    """The test above can fail: gradients that stay in the graphs' memory are wrong, or torch says so."""
    plain, _, _ = train(TinyTransformer, plain_step, dynamo_backend="no")
    before, cuda_graphs.copy_gradients = cuda_graphs.copy_gradients, lambda parameters: []
    try:
        with without_delay():
            losses, said, _ = train(TinyTransformer, plain_step)
        assert "replayed as CUDA graphs; a step" in said, said
        assert losses != pytest.approx(plain, abs=1e-3)
    except RuntimeError as error:
        if "overwritten" not in str(error):
            raise
    finally:
        cuda_graphs.copy_gradients = before


@pytest.mark.gpu
def test_a_mode_with_graphs_accumulates_exactly() -> None:
    run_on_ranks(1, with_a_mode, device="cuda", timeout=240)


def with_a_mode() -> None:
    plain, _, _ = train(TinyTransformer, plain_step, dynamo_backend="no")
    losses, _, _ = train(
        TinyTransformer,
        plain_step,
        dynamo_plugin=TorchDynamoPlugin(backend="inductor", mode="reduce-overhead", use_regional_compilation=True),
    )
    assert losses == pytest.approx(plain, abs=2e-4)


@pytest.mark.gpu
def test_one_setting_forbids_graphs() -> None:
    run_on_ranks(1, forbidden, device="cuda", timeout=240)


def forbidden() -> None:
    with without_delay():
        _, said, _ = train(TinyTransformer, plain_step, dynamo_plugin=TorchDynamoPlugin(cuda_graphs=False))
    assert "compiled by inductor" in said, said
    assert "CUDA graphs" not in said
