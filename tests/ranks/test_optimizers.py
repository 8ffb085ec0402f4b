"""Optimizers beyond AdamW: Muon on whole matrices, and the quantized states of torchao, sharded and resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paceline import Accelerator
from paceline.errors import ConfigError
from paceline.trainer import Trainer, TrainingArguments
from paceline.trainer.optim.muon import MuonAdamW, muon_groups, orthogonalize
from tests.support.engines import needs_deepspeed
from tests.support.models import TinyTransformer, make_tokens, token_losses
from tests.support.ranks import run_on_ranks

WIDTH = 64


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    return muon_groups(model, [{"params": list(model.parameters())}])


def test_matrices_inside_the_model_are_muons() -> None:
    model = TinyTransformer()
    names = {id(p): name for name, p in model.named_parameters()}
    chosen = {names[id(p)] for group in groups_of(model) if group["muon"] for p in group["params"]}
    assert chosen == {f"blocks.{i}.{name}.weight" for i in range(3) for name in ("attention", "mlp.0", "mlp.2")}, (
        "neither embeddings, nor the head, nor vectors"
    )
    untied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    [muon, adam] = groups_of(untied)
    assert [p.shape for p in muon["params"]] == [(4, 4)]
    assert len(adam["params"]) == 4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("nesterov", [True, False])
def test_one_process_does_what_torchs_muon_and_adamw_do(nesterov: bool) -> None:
    models = [TinyTransformer(), TinyTransformer()]
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    more: dict[str, Any] = {"momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": "original"}
    own = MuonAdamW(groups_of(models[0]), **settings, **more)
    torchs = [
        torch.optim.Muon(groups_of(models[1])[0]["params"], **settings, **more),
        torch.optim.AdamW(groups_of(models[1])[1]["params"], **settings),
    ]
    for i in range(5):
        tokens = make_tokens(3, seed=i)
        for model in models:
            token_losses(model(tokens), tokens).mean().backward()  # type: ignore[no-untyped-call]
        for optimizer in (own, *torchs):
            optimizer.step()
            optimizer.zero_grad()
        for model in models:
            model.zero_grad()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_singular_values_come_close_to_one() -> None:
    for shape in ((40, 10), (10, 40), (16, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), 5).float())
        assert float(values.min()) > 0.5
        assert float(values.max()) < 1.3


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyTransformer(width=WIDTH)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": token_losses(self.inner(tokens), labels).mean()}


DATA = [{"tokens": row, "labels": row} for row in make_tokens(64)]


def train(folder: str, optim: str, resume: str | None = None, **settings: Any) -> tuple[list[float], Trainer]:
    arguments = TrainingArguments(
        **{
            "output_dir": folder,
            "use_cpu": True,
            "optim": optim,
            "per_device_train_batch_size": 8 // int(os.environ.get("WORLD_SIZE", "1")),
            "max_steps": 6,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "logging_steps": 1,
            "save_steps": 3,
            "log_level": "error",
            "disable_tqdm": True,
            "train_sampling_strategy": "sequential",
            **settings,
        }
    )
    # torchao compiles its step, which needs a compiler of C++ here, and minutes.
    torch.compiler.set_stance("force_eager")
    try:
        trainer = Trainer(WithLoss(), arguments, train_dataset=DATA)
        trainer.train(resume_from_checkpoint=resume)
    finally:
        torch.compiler.set_stance("default")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer


FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Block"]}}


def on_rank(folder: str, optim: str, exact: bool, settings: dict[str, Any]) -> list[float]:
    name = os.path.join(folder, "first")  # noqa: PTH118
    losses, trainer = train(name, optim, **settings)
    kind = type(trainer.optimizer.optimizer)
    assert kind.__name__ == {"muon": "MuonAdamW", "adamw_torch_8bit": "AdamW8bit"}[optim]
    resumed, again = train(
        os.path.join(folder, "second"),  # noqa: PTH118
        optim,
        resume=os.path.join(name, "checkpoint-3"),  # noqa: PTH118
        **settings,
    )
    if exact:
        assert resumed == losses
    else:
        assert resumed == pytest.approx(losses, rel=2e-3)
        states = [s["exp_avg"] for s in again.optimizer.optimizer.state.values()]
        locals_ = [getattr(s, "_local_tensor", s) for s in states]
        assert {type(s).__name__ for s in locals_} == {"OptimState8bit", "Tensor"}, "quantized again"
    return losses


@pytest.mark.parametrize("optim", ["muon", "adamw_torch_8bit"])
def test_sharded_training_is_that_of_one_process_and_resumes(optim: str, tmp_path: Path) -> None:
    if optim != "muon":
        pytest.importorskip("torchao")
    alone = run_on_ranks(1, on_rank, str(tmp_path / "one"), optim, optim == "muon", {})[0]
    for name, settings in (("ddp", {}), ("fsdp", FSDP)):
        found = run_on_ranks(2, on_rank, str(tmp_path / name), optim, optim == "muon", settings)[0]
        # bf16 rounds a matrix with tiny differences now and then to the other neighbour; blocks of quantized states
        # are those of a rank's rows.
        assert found == pytest.approx(alone, rel=2e-3 if optim == "muon" else 1e-2)


def test_quantized_states_are_read_by_plain_adamw(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    train(str(tmp_path / "first"), "adamw_torch_8bit")
    losses, _ = train(str(tmp_path / "second"), "adamw_torch", resume=str(tmp_path / "first" / "checkpoint-3"))
    expected, _ = train(str(tmp_path / "third"), "adamw_torch")
    assert losses == pytest.approx(expected, rel=2e-2)


def under_deepspeed(folder: str) -> None:
    arguments = TrainingArguments(
        output_dir=folder,
        optim="muon",
        use_cpu=True,
        deepspeed={"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"},
    )
    with pytest.raises(ConfigError, match="Muon needs whole matrices"):
        Trainer(WithLoss(), arguments, train_dataset=DATA)


@needs_deepspeed
def test_muon_under_deepspeed_is_refused(tmp_path: Path) -> None:
    run_on_ranks(1, under_deepspeed, str(tmp_path))


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(ConfigError, match="match_rms_adamw or original"):
        MuonAdamW([nn.Parameter(torch.ones(2, 2))], adjust_lr_fn="none")


def test_muon_in_a_loop_of_ones_own() -> None:
    accelerator = Accelerator(cpu=True)
    model: Any = TinyTransformer()
    model, optimizer = accelerator.prepare(model, MuonAdamW(groups_of(model), lr=0.01))
    losses = []
    for _ in range(8):
        tokens = make_tokens(4, seed=0)
        loss = token_losses(model(tokens), tokens).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
