"""fp8: the layers that are converted, their losses against bf16, and checkpoints that other precisions read.

There are no fp8 units here, so torchao rounds to fp8 and multiplies in high precision.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from paceline import Accelerator
from paceline.config import FP8Config, FullyShardedDataParallelPlugin
from paceline.errors import ConfigError, PrepareError
from tests.support.models import TinyTransformer, make_tokens, token_losses
from tests.support.ranks import run_on_ranks

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torchao")

STEPS = 6
# Rounding to fp8 moves every one of these losses, which fall from 27 to 16, by less than this part; bf16 by 0.15 %.
BOUND = 0.02


def run(strategy: str, precision: str, **settings: Any) -> tuple[Accelerator, Any, Any]:
    """An Accelerator with a prepared model and optimizer."""
    handlers: list[Any] = []
    if precision == "fp8":
        handlers = [FP8Config(**{"emulate": True, "skip_small_layers": False, **settings.pop("fp8", {})})]
    accelerator = Accelerator(
        cpu=True, strategy=strategy, mixed_precision=precision, kwargs_handlers=handlers, **settings
    )
    model = TinyTransformer(width=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    prepared, stepped = accelerator.prepare(model, optimizer)
    return accelerator, prepared, stepped


def train(accelerator: Accelerator, model: Any, optimizer: Any, first: int = 0, steps: int = STEPS) -> list[float]:
    """Losses over all ranks."""
    losses = []
    for i in range(first, first + steps):
        tokens = make_tokens(4, seed=i)[accelerator.process_index :: accelerator.num_processes]
        loss = token_losses(model(tokens), tokens).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    return losses


def on_rank(strategy: str, folder: str, fp8: dict[str, Any]) -> None:
    plain = train(*run(strategy, "bf16"))
    accelerator, model, optimizer = run(strategy, "fp8", fp8=fp8)
    names = list(accelerator.unwrap_model(model).state_dict())
    assert names == list(TinyTransformer(width=32).state_dict())
    losses = train(accelerator, model, optimizer)
    assert losses != plain, "the layers were rounded to fp8"
    assert losses == pytest.approx(plain, rel=BOUND)
    assert losses[-1] < losses[0]
    said = accelerator.describe()
    assert f"fp8 {fp8.get('recipe', 'tensorwise')}: 3 attention, 3 0, 3 2" in said
    assert "in bf16: 1 last" in said
    assert ("gathered in fp8" in said) == (strategy == "fsdp" and not fp8)
    assert accelerator.mixed_precision == "fp8"

    path = os.path.join(folder, "state")  # noqa: PTH118
    accelerator.save_state(path)
    state = {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}
    expected = train(accelerator, model, optimizer, STEPS, 3)
    for precision in ("fp8", "bf16"):
        again, other, stepped = run(strategy, precision, **({"fp8": fp8} if precision == "fp8" else {}))
        again.load_state(path)
        loaded = again.get_state_dict(other)
        assert all(torch.equal(value, loaded[name]) for name, value in state.items())
        assert all(type(value) is torch.Tensor and value.dtype == torch.float32 for name, value in loaded.items())
        found = train(again, other, stepped, STEPS, 3)
        if precision == "fp8":
            assert found == expected, "a resumed run is the same to the last bit"
        else:
            assert found == pytest.approx(expected, rel=BOUND)


@pytest.mark.parametrize(
    ("strategy", "ranks", "fp8"),
    [
        ("single", 1, {}),
        ("single", 1, {"recipe": "rowwise"}),
        ("ddp", 2, {}),
        ("fsdp", 2, {}),
        ("fsdp", 2, {"enable_fsdp_float8_all_gather": False}),
    ],
)
def test_losses_are_close_to_bf16_and_checkpoints_hold_master_weights(
    strategy: str, ranks: int, fp8: dict[str, Any], tmp_path: Path
) -> None:
    run_on_ranks(ranks, on_rank, strategy, str(tmp_path), fp8)


def gathered_and_whole(_: int) -> None:
    """Weights gathered in fp8 give the losses of weights that are rounded after they are gathered in bf16."""
    rows = []
    for gathers in (True, False):
        accelerator, model, optimizer = run("fsdp", "fp8", fp8={"enable_fsdp_float8_all_gather": gathers})
        rows.append(train(accelerator, model, optimizer))
    assert rows[0] == pytest.approx(rows[1], rel=BOUND)


def test_gathering_in_fp8_changes_little() -> None:
    run_on_ranks(2, gathered_and_whole, 0)


def uneven(_: int) -> None:
    """Thirty-two rows on three ranks: their weights are gathered in bf16."""
    rows = []
    for gathers in (True, False):
        accelerator, model, optimizer = run("fsdp", "fp8", fp8={"enable_fsdp_float8_all_gather": gathers})
        rows.append(train(accelerator, model, optimizer, steps=2))
    assert rows[0] == pytest.approx(rows[1], rel=BOUND)


def test_weights_whose_rows_do_not_divide_over_the_ranks() -> None:
    run_on_ranks(3, uneven, 0)


def rounded_once(_: int) -> None:
    """Shards are rounded once after each step, and what is gathered is what torchao would cast."""
    from paceline.strategies.precision.fp8_rounding import Rounding

    rounded: list[int] = []
    plain = Rounding.__call__

    def counting(self: Any, scales: Any) -> Any:
        rounded.append(len(scales))
        return plain(self, scales)

    accelerator, model, optimizer = run("fsdp", "fp8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rounding, "__call__", counting)
        losses = train(accelerator, model, optimizer, steps=3)
    assert rounded == [9, 9, 9], "nine weights, after each of three steps"
    with pytest.MonkeyPatch.context() as patch:
        # Nothing is kept, so that torchao casts in each gather.
        patch.setattr("paceline.strategies.precision.fp8_gathering.GatheredWeights._round", lambda *_: None)
        expected = train(*run("fsdp", "fp8"), steps=3)
    assert losses == expected


def test_shards_are_rounded_once_a_step() -> None:
    run_on_ranks(2, rounded_once, 0)


def scaled_alike(_: int) -> None:
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    accelerator, model, optimizer = run("fsdp", "fp8")
    train(accelerator, model, optimizer, steps=2)
    weights: list[Any] = [p for p in model.parameters() if hasattr(p._local_tensor, "_precomputed_scale")]
    found = [weight._local_tensor._precomputed_scale for weight in weights]
    precompute_float8_dynamic_scale_for_fsdp(model)
    assert len(found) == 9
    assert found == [weight._local_tensor._precomputed_scale for weight in weights]


def test_scales_are_torchaos() -> None:
    run_on_ranks(2, scaled_alike, 0)


def changed_by_hand(_: int) -> None:
    """Weights that the script changes between steps are scaled anew; with old scales the loss is 24 in place of 14."""
    rows = []
    for gathers in (True, False):
        accelerator, model, optimizer = run("fsdp", "fp8", fp8={"enable_fsdp_float8_all_gather": gathers})
        train(accelerator, model, optimizer, steps=2)
        with torch.no_grad():
            plain: Any = accelerator.unwrap_model(model)
            for block in plain.blocks:
                block.attention.weight.mul_(50)
        tokens = make_tokens(4, seed=9)
        rows.append(float(token_losses(model(tokens), tokens).mean()))
    assert rows[0] == pytest.approx(rows[1], rel=0.1)


def test_changed_weights_are_scaled_anew() -> None:
    run_on_ranks(2, changed_by_hand, 0)


def recomputed(_: int) -> None:
    accelerator, model, optimizer = run(
        "fsdp", "fp8", fsdp_plugin=FullyShardedDataParallelPlugin(activation_checkpointing=True)
    )
    found = train(accelerator, model, optimizer)
    assert "3 attention" in accelerator.describe()
    expected = train(*run("fsdp", "fp8"))
    assert found == pytest.approx(expected, abs=1e-6)


def test_recomputed_blocks_have_the_same_losses() -> None:
    run_on_ranks(2, recomputed, 0)


def test_a_model_can_be_prepared_again_in_another_precision() -> None:
    accelerator, model, optimizer = run("single", "fp8")
    hooked: list[int] = []
    layer = model.blocks[0].attention
    layer.register_forward_hook(lambda *_: hooked.append(1))
    train(accelerator, model, optimizer, steps=1)
    assert hooked, "hooks of the layer stay"
    assert type(layer).__name__ == "Float8Linear"
    accelerator.free_memory()
    again = Accelerator(cpu=True, strategy="single", mixed_precision="bf16")
    again.prepare(model)
    assert model.blocks[0].attention is layer
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    assert "config" not in vars(layer)


def test_layers_are_left_out_by_name_size_and_place() -> None:
    accelerator, _, _ = run("single", "fp8", fp8={"exclude": ["mlp.0"]})
    said = accelerator.describe()
    assert "3 attention, 3 2" in said
    assert "3 excluded" in said
    with pytest.raises(PrepareError, match=r"did you mean attention\?"):
        run("single", "fp8", fp8={"exclude": ["atention"]})
    with pytest.raises(PrepareError, match="9 too small"):
        run("single", "fp8", fp8={"skip_small_layers": True})


class Odd(nn.Module):
    """Layers of sizes that cannot be multiplied in fp8, and a last one without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 32)
        self.second = nn.Linear(32, 32)
        self.last = nn.Linear(32, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.second(self.first(x)))
        return out


def test_odd_sizes_and_the_last_layer_stay() -> None:
    handlers = [FP8Config(emulate=True, skip_small_layers=False)]
    accelerator = Accelerator(cpu=True, mixed_precision="fp8", kwargs_handlers=handlers)
    model: Any = accelerator.prepare_model(Odd())
    assert "1 second; in bf16: 1 not divisible by 16; 1 last" in accelerator.describe()
    # 5 rows: the inner dimension of the weight's gradient is padded.
    model(torch.randn(5, 24)).sum().backward()
    assert model.second.weight.grad is not None


def test_it_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="fp8 needs an NVIDIA GPU"):
        Accelerator(cpu=True, mixed_precision="fp8")
    with pytest.raises(ConfigError, match=r"torch\.compile turned off"):
        Accelerator(cpu=True, mixed_precision="fp8", dynamo_backend="no")
    with pytest.raises(ConfigError, match="torchao computes fp8"):
        FP8Config(backend="TE")
    with pytest.raises(ConfigError, match="64 is not used"):
        FP8Config(amax_history_len=64)
    with pytest.raises(ConfigError, match="DeepSpeed's engine"):
        Accelerator(cpu=True, mixed_precision="fp8", strategy="deepspeed", kwargs_handlers=[FP8Config(emulate=True)])
    with pytest.raises(ConfigError, match="mixed_precision is bf16"):
        Accelerator(cpu=True, mixed_precision="bf16", kwargs_handlers=[FP8Config(recipe="rowwise")])
