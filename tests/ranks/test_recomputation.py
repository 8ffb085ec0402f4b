"""Activation memory budget and selective checkpointing: the same losses, with less kept or less computed twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from paceline import Accelerator
from paceline.config import FullyShardedDataParallelPlugin, TorchDynamoPlugin
from paceline.errors import ConfigError, PrepareError
from paceline.trainer.model_changes import checkpoint_activations
from tests.support.models import TinyTransformer, make_tokens, token_losses
from tests.support.ranks import run_on_ranks


def train(strategy: str, **settings: Any) -> tuple[list[float], int]:
    """Losses of four steps, and the bytes that the last forward kept for its backward."""
    torch._dynamo.reset()
    accelerator = Accelerator(cpu=True, strategy=strategy, **settings)
    model: Any = TinyTransformer()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    losses = []
    for i in range(4):
        tokens = make_tokens(4, length=40, seed=i)[accelerator.process_index :: accelerator.num_processes]
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = token_losses(model(tokens), tokens).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    torch._dynamo.reset()
    return losses, sum(kept.values())


def budget_of(value: float) -> TorchDynamoPlugin:
    return TorchDynamoPlugin(backend="aot_eager", use_regional_compilation=True, activation_memory_budget=value)


def with_budgets(strategy: str) -> None:
    eager, _ = train(strategy)
    whole, most = train(strategy, dynamo_plugin=budget_of(1.0))
    least, kept = train(strategy, dynamo_plugin=budget_of(0.0))
    assert whole == pytest.approx(eager, abs=1e-5)
    assert least == pytest.approx(eager, abs=1e-5)
    assert kept < 0.8 * most
    functorch: Any = torch._functorch.config
    assert functorch.activation_memory_budget == 1.0, "other models are compiled without it"


@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_a_budget_keeps_less_and_changes_no_loss(strategy: str, ranks: int) -> None:
    run_on_ranks(ranks, with_budgets, strategy)


def test_a_budget_without_a_compiler_is_an_error() -> None:
    with pytest.raises(ConfigError, match="which does not divide forward and backward"):
        TorchDynamoPlugin(backend="eager", activation_memory_budget=0.5)
    with pytest.raises(ConfigError, match="nothing is compiled"):
        TorchDynamoPlugin(backend="no", activation_memory_budget=0.5)
    with pytest.raises(ConfigError, match="a checkpointed block keeps its input only"):
        Accelerator(
            cpu=True,
            fsdp_plugin=FullyShardedDataParallelPlugin(activation_checkpointing=True),
            dynamo_plugin=budget_of(0.5),
        )
    accelerator = Accelerator(cpu=True, dynamo_plugin=TorchDynamoPlugin(activation_memory_budget=0.5))
    with pytest.raises(PrepareError, match="auto compiles on CUDA only"):
        accelerator.prepare(TinyTransformer())


def flops(policy: str | None) -> int:
    """Of a forward and backward."""
    model = TinyTransformer()
    if policy is not None:
        checkpoint_activations(model, {"policy": policy})
    tokens = make_tokens(2)
    with FlopCounterMode(display=False) as counter:
        token_losses(model(tokens), tokens).mean().backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


def gradients(policy: str | None) -> torch.Tensor:
    model = TinyTransformer()
    if policy is not None:
        checkpoint_activations(model, {"policy": policy})
    tokens = make_tokens(2)
    token_losses(model(tokens), tokens).mean().backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_linear_layer_that_zero_3_leaves_behind_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradients(None)
    left_behind = pytest.importorskip("deepspeed.runtime.zero.linear").zero3_linear_wrap
    monkeypatch.setattr(torch.nn.functional, "linear", left_behind)
    assert torch.equal(gradients("products"), expected)


def test_products_are_not_computed_twice() -> None:
    assert flops("products") == flops(None)
    assert flops("full") > 1.2 * flops(None)
    with pytest.raises(PrepareError, match="Write full or products"):
        checkpoint_activations(TinyTransformer(), {"policy": "some"})


def under_fsdp(_: int) -> None:
    found = {}
    plain = FullyShardedDataParallelPlugin()
    plugins = {
        "none": plain,
        "full": plain.changed(activation_checkpointing=True),
        "products": plain.changed(activation_checkpointing=True, activation_checkpointing_policy="products"),
    }
    for name, plugin in plugins.items():
        found[name] = train("fsdp", fsdp_plugin=plugin)[0]
    assert found["full"] == pytest.approx(found["none"], rel=1e-6)
    assert found["products"] == pytest.approx(found["none"], rel=1e-6)


def test_selective_checkpointing_under_fsdp_changes_no_loss() -> None:
    run_on_ranks(2, under_fsdp, 0)
    with pytest.raises(ConfigError, match="nothing is recomputed"):
        FullyShardedDataParallelPlugin(activation_checkpointing_policy="products")
