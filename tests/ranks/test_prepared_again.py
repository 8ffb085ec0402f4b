"""Modules that are prepared a second time, or come sharded already: trained on as they are, or refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from paceline import Trainer, TrainingArguments
from paceline.checkpoint import open_checkpoint
from paceline.errors import PrepareError
from tests.ranks.test_trainer import LAYOUTS
from tests.support.engines import slowly
from tests.support.models import TinyTransformer, make_tokens, token_losses
from tests.support.ranks import run_on_ranks
from tests.support.trainer import Sentences, arguments, farthest, tagger, timeless
from tests.support.training import DDP, FSDP, SINGLE, Layout, build, make_optimizer

if TYPE_CHECKING:
    from pathlib import Path

    from paceline import Accelerator

BY_CLASS = Layout("by class", 2, "fsdp", {"transformer_cls_names_to_wrap": ["Block"]})
BY_SIZE = Layout("by size", 2, "fsdp", {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 800})
CHECKPOINTED = Layout("checkpointed", 2, "fsdp", {"activation_checkpointing": True})
WHOLE = Layout("one unit", 2, "fsdp", {"auto_wrap_policy": "NO_WRAP"})


def train(accelerator: Accelerator, model: Any, seed: int, *, leave_open: bool = False) -> list[float]:
    """Three steps with a new optimizer; losses over the global batch."""
    optimizer: Any
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    losses = []
    share = 12 // accelerator.num_processes
    batches: Any = make_tokens(36, seed=seed)
    for tokens in batches.split(12):
        mine = tokens[accelerator.process_index * share :][:share]
        loss = token_losses(model(mine), mine).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    if leave_open:
        with accelerator.no_sync(model):
            accelerator.backward(token_losses(model(mine), mine).mean())
        model.zero_grad()
    return losses


def again(layout: Layout, folder: str, how: str) -> list[float]:
    accelerator = build(layout, "cpu")
    model: Any = TinyTransformer(seed=4)
    losses = train(accelerator, model, 1, leave_open=how == "inside a window")
    if how == "another accelerator":
        accelerator = build(layout, "cpu")
    elif how != "without free_memory":
        accelerator.free_memory()
    if how == "evaluation between":
        evaluated = accelerator.prepare_model(model, evaluation_mode=True)
        with torch.no_grad():
            evaluated(make_tokens(4))
        accelerator.free_memory()
    losses += train(accelerator, model, 2)
    if how != "without free_memory":
        accelerator.save_state(folder)
    return losses


WAYS = [
    (BY_CLASS, "free_memory"),
    *slowly([(BY_SIZE, "free_memory")]),
    (CHECKPOINTED, "inside a window"),
    (WHOLE, "another accelerator"),
    (FSDP, "evaluation between"),
    (FSDP, "without free_memory"),
    (DDP, "free_memory"),
]


@pytest.mark.parametrize(("layout", "how"), WAYS, ids=str)
def test_the_same_module_is_prepared_again(layout: Layout, how: str, tmp_path: Path) -> None:
    [alone] = run_on_ranks(1, again, SINGLE, str(tmp_path / "alone"), "free_memory")
    for losses in run_on_ranks(2, again, layout, str(tmp_path / "again"), how):
        assert losses == pytest.approx(alone, abs=1e-5)
    if how == "without free_memory":
        return
    one, two = open_checkpoint(tmp_path / "alone"), open_checkpoint(tmp_path / "again")
    assert one.manifest.tensors.keys() == two.manifest.tensors.keys()
    for name in one.manifest.tensors:
        assert torch.allclose(one.read(name), two.read(name), atol=1e-5), name


# Sharded by the script itself


def by_the_script(folder: str, how: str) -> list[float]:
    accelerator = build(BY_CLASS, "cpu")
    model: Any = TinyTransformer(seed=4)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks if how != "the root alone" else []:
        fully_shard(block, mesh=mesh)
    if how != "blocks alone":
        fully_shard(model, mesh=mesh)
    losses = train(accelerator, model, 1)
    accelerator.free_memory()
    losses += train(accelerator, model, 2)
    parameters = list(model.parameters())
    assert isinstance(model, FSDPModule)
    assert all(isinstance(p, DTensor) for p in parameters)
    accelerator.save_state(folder)
    return losses


@pytest.mark.parametrize("how", ["all of it", *slowly(["blocks alone", "the root alone"])])
def test_what_the_script_sharded_is_trained(how: str, tmp_path: Path) -> None:
    [alone] = run_on_ranks(1, again, SINGLE, str(tmp_path / "alone"), "free_memory")
    for losses in run_on_ranks(2, by_the_script, str(tmp_path / "state"), how):
        assert losses == pytest.approx(alone, abs=1e-5)
    held = open_checkpoint(tmp_path / "state").manifest.tensors
    assert held.keys() == open_checkpoint(tmp_path / "alone").manifest.tensors.keys()


def sharded(**how: Any) -> Any:
    model = TinyTransformer(seed=4)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), **how)
    return model


def refusals() -> None:
    half = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(PrepareError, match=r"sharded already, to compute in bf16.*computes in fp32.*Rebuild the model"):
        build(FSDP, "cpu").prepare_model(half)
    scale = TinyTransformer(seed=4)
    bare = scale.norm
    fully_shard(scale, mesh=init_device_mesh("cpu", (2,)), ignored_params=set(bare.parameters()))
    with pytest.raises(PrepareError, match=r"norm\.weight, norm\.bias of .*trainable and not sharded.*Freeze them"):
        build(FSDP, "cpu").prepare_model(scale)
    bare.requires_grad_(False)
    build(FSDP, "cpu").prepare_model(scale)


def test_what_was_sharded_otherwise_is_named() -> None:
    run_on_ranks(2, refusals)


def under_another_strategy(layout: Layout) -> None:
    model = sharded()
    with pytest.raises(PrepareError, match=r"(?s)tokens\.weight.*sharded.*fsdp"):
        build(layout, "cpu").prepare(model, make_optimizer(model))


@pytest.mark.parametrize("layout", [DDP], ids=str)
def test_what_is_sharded_trains_under_fsdp_alone(layout: Layout) -> None:
    run_on_ranks(layout.ranks, under_another_strategy, layout)


# The Trainer


def twice(folder: str, changes: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    made = TrainingArguments(**arguments(folder, max_steps=4, save_strategy="no", **changes))
    trainer = Trainer(tagger(), made, train_dataset=Sentences(48, 1), eval_dataset=Sentences(21, 2))
    trainer.evaluate()
    trainer.train()
    log = list(trainer.state.log_history)
    trainer.evaluate()
    trainer.train()
    log += trainer.state.log_history
    trainer.save_model(folder)
    return [timeless(entry) for entry in log], {"loss": trainer.evaluate()["eval_loss"]}


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_evaluate_and_train_and_train_again(layout: str, tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[layout]
    batch = {"global_batch_size": 8}
    [(alone, loss)] = run_on_ranks(1, twice, str(tmp_path / "alone"), batch)
    for log, found in run_on_ranks(ranks, twice, str(tmp_path / layout), {**batch, **changes}):
        assert found == pytest.approx(loss, abs=1e-5)
        if log:
            assert farthest(alone, log) < 1e-5
