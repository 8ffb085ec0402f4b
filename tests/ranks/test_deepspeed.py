"""What only DeepSpeed has, on two real ranks: its configuration, stand-ins, building sharded, several models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from paceline import Accelerator, DeepSpeedPlugin, DummyOptim, DummyScheduler
from paceline.errors import ConfigError, PrecisionError, PrepareError, SteppingError
from tests.support.engines import ZERO_STAGES, make, needs_deepspeed, slowly, with_deepspeed
from tests.support.models import TinyTransformer, make_tokens, token_losses
from tests.support.ranks import run_on_ranks

pytestmark = needs_deepspeed


def batch_of(accelerator: Accelerator, seed: int = 0) -> torch.Tensor:
    return make_tokens(4, seed=seed)[accelerator.process_index :: accelerator.num_processes]


def step(accelerator: Accelerator, model: Any, optimizer: Any, seed: int = 0) -> float:
    tokens = batch_of(accelerator, seed)
    loss = token_losses(model(tokens), tokens).mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return float(accelerator.reduce(loss.detach(), "mean"))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    # A large eps: Adam divides rounding noise by rounding noise where a gradient is zero in theory.
    return torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)


def plain_losses(count: int, clip: float | None = None) -> list[float]:
    """The same training in plain PyTorch on one rank."""
    model = TinyTransformer()
    optimizer = adamw(model)
    losses = []
    for seed in range(count):
        tokens = make_tokens(4, seed=seed)
        loss = token_losses(model(tokens), tokens).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# Stepping


def half_precision() -> str | None:
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().is_fp16_supported():
        return None
    with pytest.raises(PrecisionError) as error:
        make("zero2", mixed_precision="fp16")
    return str(error.value)


def test_fp16_is_refused_where_deepspeed_has_none() -> None:
    for message in run_on_ranks(2, half_precision):
        if message is None:
            pytest.skip("DeepSpeed computes in fp16 on this processor")
        assert "mixed_precision='fp16' was requested on DeepSpeed on" in message
        assert "bf16" in message


def go_wrong(accelerator: Accelerator, model: Any, optimizer: Any, case: str) -> None:
    tokens = batch_of(accelerator)
    losses = token_losses(model(tokens), tokens)
    match case:
        case "twice":
            accelerator.backward(losses.mean())
            accelerator.backward(token_losses(model(tokens), tokens).mean())
        case "closure":
            accelerator.backward(losses.mean())
            optimizer.step(lambda: 0.0)
        case "no scalar":
            accelerator.backward(losses)
        case "join":
            with accelerator.join_uneven_inputs([model]):
                pass


def misuse(strategy: str, case: str) -> str:
    accelerator = make(strategy)
    model: Any = TinyTransformer()
    model, optimizer = accelerator.prepare(model, adamw(model))
    with pytest.raises(SteppingError) as error:
        go_wrong(accelerator, model, optimizer, case)
    return str(error.value)


@pytest.mark.parametrize("strategy", with_deepspeed(["zero0", "zero2", "zero3"]))
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("twice", "Add the losses up and call backward() once"),
        ("closure", "optimizer.step(closure) was called under DeepSpeed"),
        ("no scalar", "a loss of shape [2, 8]"),
        ("join", "a rank without a batch cannot follow along"),
    ],
)
def test_what_the_engine_cannot_do_is_named(strategy: str, case: str, words: str) -> None:
    assert all(words in message for message in run_on_ranks(2, misuse, strategy, case))


def clipped_by_configuration(strategy: str, script: float | None) -> list[float]:
    accelerator = make(strategy, deepspeed_plugin={"gradient_clipping": 0.25})
    model: Any = TinyTransformer()
    model, optimizer = accelerator.prepare(model, adamw(model))
    losses = []
    for seed in range(4):
        tokens = batch_of(accelerator, seed)
        loss = token_losses(model(tokens), tokens).mean()
        accelerator.backward(loss)
        if script is not None:
            accelerator.clip_grad_norm_(model.parameters(), script)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    assert accelerator.strategy.settings["gradient_clipping"] == 0.25
    return losses


@pytest.mark.parametrize("script", [None, 0.25], ids=["alone", "and the script"])
@pytest.mark.parametrize("strategy", ZERO_STAGES)
def test_the_configuration_may_clip(strategy: str, script: float | None) -> None:
    wanted = plain_losses(4, clip=0.25)
    assert wanted != pytest.approx(plain_losses(4), abs=1e-3), "clipping makes no difference here"
    for losses in run_on_ranks(2, clipped_by_configuration, strategy, script):
        assert losses == pytest.approx(wanted, abs=1e-5)


def clipped_twice() -> str:
    with pytest.raises(SteppingError) as error:
        clipped_by_configuration("zero2", 1.0)
    return str(error.value)


def test_two_largest_norms_clash() -> None:
    for message in run_on_ranks(2, clipped_twice):
        assert "clip_grad_norm_(max_norm=1) was called" in message
        assert "gradient_clipping 0.25" in message


# One owner per value


def settings_of(plugin: dict[str, Any], arguments: dict[str, Any], batch: int = 2) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(**plugin), **arguments)
    model: Any = nn.Linear(4, 4)
    model.config = type("Config", (), {"hidden_size": 8})()
    loader: Any = DataLoader(make_tokens(8), batch_size=batch)  # type: ignore[arg-type]
    accelerator.prepare(model, adamw(model), loader)
    settings: dict[str, Any] = accelerator.strategy.settings
    json.dumps(settings)
    return settings


AUTO_JSON: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "communication_data_type": "fp32",
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}


def test_auto_is_filled_from_the_run() -> None:
    arguments = {"mixed_precision": "bf16", "gradient_accumulation_steps": 3}
    for settings in run_on_ranks(2, settings_of, {"hf_ds_config": AUTO_JSON}, arguments):
        assert settings["train_batch_size"] == 12
        assert settings["train_micro_batch_size_per_gpu"] == 2
        assert settings["gradient_accumulation_steps"] == 3
        assert (settings["bf16"]["enabled"], settings["fp16"]["enabled"]) == (True, False)
        assert settings["zero_optimization"]["reduce_bucket_size"] == 64
        assert settings["zero_optimization"]["stage3_prefetch_bucket_size"] == 57
        assert settings["zero_optimization"]["stage3_param_persistence_threshold"] == 80
        assert "auto" not in json.dumps(settings)


def clashing(arguments: dict[str, Any], extra: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        settings_of({"hf_ds_config": AUTO_JSON | extra}, arguments)
    return [str(problem) for problem in error.value.problems]


def test_values_that_contradict_the_run_are_named_all_at_once() -> None:
    extra = {
        "train_batch_size": 7,
        "train_micro_batch_size_per_gpu": 5,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
    }
    for found in run_on_ranks(2, clashing, {}, extra):
        text = "\n".join(found)
        assert len(found) == 3, text
        assert "the prepared loader gives each rank batches of 2" in text
        assert "2 ranks x 1 micro-batches x 5 samples make 10" in text
        assert "AdamW is described, and the script has an optimizer AdamW" in text


def test_values_that_contradict_the_script_are_named_all_at_once() -> None:
    said = {"gradient_accumulation_steps": 3, "mixed_precision": "no"}
    extra = {"gradient_accumulation_steps": 2, "bf16": {"enabled": True}}
    for found in run_on_ranks(2, clashing, said, extra):
        assert len(found) == 2
        assert all("Accelerator(" in problem and "hf_ds_config" in problem for problem in found), found


# Stand-ins

OPTIMIZER: dict[str, Any] = {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
}
WARMUP_DECAY: dict[str, Any] = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": "auto",
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
        "total_num_steps": "auto",
        "warmup_type": "linear",
    },
}


def train_with_placeholders(
    stage: int, scheduler: dict[str, Any], own: bool
) -> tuple[list[float], list[float], dict[str, Any]]:
    described = {"zero_optimization": {"stage": stage}, "optimizer": OPTIMIZER, **scheduler}
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=described))
    model: Any = TinyTransformer()
    optimizer: Any = DummyOptim(model.parameters(), lr=0.01, weight_decay=0.1, eps=1e-3)
    callable_ = (lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)) if own else None
    schedule: Any = DummyScheduler(optimizer, total_num_steps=10, warmup_num_steps=4, lr_scheduler_callable=callable_)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    losses, rates = [], []
    for seed in range(6):
        losses.append(step(accelerator, model, optimizer, seed))
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1])
    return losses, rates, accelerator.strategy.settings


@pytest.mark.parametrize("stage", range(4))
def test_a_described_optimizer_and_schedule(stage: int) -> None:
    results = run_on_ranks(2, train_with_placeholders, stage, {"scheduler": WARMUP_DECAY}, False)
    for losses, rates, settings in results:
        assert losses[-1] < losses[0]
        # Up to 0.01 in 4 steps, down to 0 at step 10.
        assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01 * 5 / 6, 0.01 * 4 / 6], abs=2.6e-3)
        assert max(rates) == pytest.approx(0.01)
        assert settings["optimizer"]["params"]["lr"] == 0.01
        assert settings["optimizer"]["params"]["eps"] == 1e-3
        assert settings["optimizer"]["params"]["betas"] == [0.9, 0.999]
        assert settings["scheduler"]["params"]["total_num_steps"] == 10
        assert settings["scheduler"]["params"]["warmup_max_lr"] == 0.01
    assert results[0][:2] == results[1][:2]


def groups_of_placeholder(stage: int) -> list[tuple[float, float]]:
    described = {"zero_optimization": {"stage": stage}, "optimizer": OPTIMIZER, "scheduler": WARMUP_DECAY}
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=described))
    model: Any = TinyTransformer()
    weights, others = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim < 2]
    groups: Any = [{"params": weights}, {"params": others, "weight_decay": 0.0, "lr": 0.005}]
    optimizer: Any = DummyOptim(groups, lr=0.01, weight_decay=0.1)
    schedule: Any = DummyScheduler(optimizer, total_num_steps=10, warmup_num_steps=1)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    for seed in range(2):
        step(accelerator, model, optimizer, seed)
        schedule.step()
    return [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("stage", [2, 3])
def test_groups_of_a_placeholder_keep_their_options(stage: int) -> None:
    for (decay, rate), (own_decay, own_rate) in run_on_ranks(2, groups_of_placeholder, stage):
        assert (decay, own_decay) == (0.1, 0.0)
        assert rate == pytest.approx(2 * own_rate)


def test_a_schedule_made_by_the_script() -> None:
    for _, rates, _ in run_on_ranks(2, train_with_placeholders, 2, {}, True):
        assert rates == pytest.approx([0.01, 0.005, 0.005, 0.0025, 0.0025, 0.00125])


def placeholder_refused(strategy: str, case: str) -> str:
    accelerator = make(strategy)
    model: Any = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = [DummyOptim(model.parameters())] if case == "optimizer" else [optimizer, DummyScheduler(optimizer)]
    with pytest.raises((PrepareError, ConfigError)) as error:
        accelerator.prepare(model, *given)
    return str(error.value)


@pytest.mark.parametrize("case", ["optimizer", "scheduler"])
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_other_strategies_refuse_placeholders(strategy: str, case: str) -> None:
    ranks = 1 if strategy == "single" else 2
    for message in run_on_ranks(ranks, placeholder_refused, strategy, case):
        assert f"is a placeholder for the {case} section of a DeepSpeed configuration" in message
        assert f"under strategy={strategy!r}" in message


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("optimizer", "a DummyOptim was prepared for it"),
        ("scheduler", "DeepSpeed configuration has no scheduler section"),
    ],
)
def test_a_placeholder_needs_its_section(case: str, words: str) -> None:
    assert words in run_on_ranks(2, placeholder_refused, "zero2", case)[0]


def unscheduled() -> str:
    described = {"zero_optimization": {"stage": 2}, "scheduler": WARMUP_DECAY}
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=described))
    model: Any = TinyTransformer()
    model, optimizer = accelerator.prepare(model, adamw(model))
    with pytest.raises(PrepareError) as error:
        step(accelerator, model, optimizer)
    return str(error.value)


def test_a_described_schedule_that_nobody_prepares_is_noticed() -> None:
    assert all("no DummyScheduler was prepared" in message for message in run_on_ranks(2, unscheduled))


def missing_tools() -> str:
    described = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam", "params": {"lr": 0.1}}}
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=described))
    model: Any = nn.Linear(2, 2)
    found = shutil.which
    shutil.which = lambda *_, **__: None
    try:
        with pytest.raises(PrepareError) as error:
            accelerator.prepare(model, DummyOptim(model.parameters()))
    finally:
        shutil.which = found
    return str(error.value)


def test_a_missing_compiler_is_named() -> None:
    for message in run_on_ranks(2, missing_tools):
        assert "g++ and ninja is not on PATH" in message
        assert '"torch_adam": true' in message


# Models that are built sharded


def built_sharded(precision: str) -> tuple[bool, list[float]]:
    accelerator = make("zero3", mixed_precision=precision)
    with accelerator.init_module():
        model: Any = TinyTransformer()
    cut = all(p.numel() == 0 and hasattr(p, "ds_id") for p in model.parameters())
    model, optimizer = accelerator.prepare(model, adamw(model))
    return cut, [step(accelerator, model, optimizer, seed) for seed in range(4)]


def test_a_model_built_sharded_trains_alike() -> None:
    for cut, losses in run_on_ranks(2, built_sharded, "no"):
        assert cut
        assert losses == pytest.approx(plain_losses(4), abs=1e-5)
    for cut, losses in run_on_ranks(2, built_sharded, "bf16"):
        assert cut
        # It was built in 16 bits, so it starts from rounded values.
        assert losses == pytest.approx(plain_losses(4), abs=0.15)


def gathered_and_changed() -> tuple[bool, bool, bool]:
    accelerator = make("zero3")
    model: Any = TinyTransformer()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    weight = model.module.head.weight
    with accelerator.gather_parameters(weight, modifier_rank=0):
        whole = weight.shape == (67, 16)
        if accelerator.is_main_process:
            weight.data.fill_(0.25)
    with accelerator.gather_parameters(model):
        seen = bool((weight == 0.25).all())
    # The optimizer's own values follow, or a step would bring the old ones back.
    step(accelerator, model, optimizer)
    with accelerator.gather_parameters([weight]):
        kept = bool((weight == 0.25).all())
    return whole, seen, kept


def test_gathered_parameters_can_be_changed() -> None:
    assert run_on_ranks(2, gathered_and_changed) == [(True, True, True)] * 2


def llama_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip


def llama(folder: str, precision: str, short: bool) -> dict[str, Any]:
    """Load sharded, train, save; what came of it."""
    from transformers import LlamaForCausalLM

    plugin = {"zero3_save_16bit_model": short}
    accelerator = make("zero3", mixed_precision=precision, deepspeed_plugin=plugin)
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    made: Any = LlamaForCausalLM._from_config(llama_config())  # type: ignore[no-untyped-call]
    cut = [all(hasattr(p, "ds_id") and p.numel() == 0 for p in one.parameters()) for one in (model, made)]
    del made
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    tokens = torch.randint(0, 99, (4, 8), generator=torch.Generator().manual_seed(3))
    loss = model(input_ids=tokens, labels=tokens).loss
    accelerator.backward(loss)
    optimizer.step()
    accelerator.save_model(model, f"{folder}/out")
    inner: Any = accelerator.unwrap_model(model)
    return {"cut": cut, "loss": float(loss.detach()), "inner": type(inner).__name__}


def plain_llama(folder: str) -> float:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config())
    cut = any(hasattr(p, "ds_id") for p in model.parameters())
    assert not cut, "a strategy that is gone still shards"
    model.save_pretrained(folder)
    tokens = torch.randint(0, 99, (4, 8), generator=torch.Generator().manual_seed(3))
    return float(model(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize(("precision", "short"), [("no", False), ("bf16", False), ("bf16", True)])
def test_transformers_builds_and_saves_sharded_models(tmp_path: Path, precision: str, short: bool) -> None:
    pytest.importorskip("transformers")
    wanted = run_on_ranks(1, plain_llama, str(tmp_path))[0]
    for found in run_on_ranks(2, llama, str(tmp_path), precision, short):
        assert found["cut"] == [True, True]
        assert found["inner"] == "LlamaForCausalLM"
        assert found["loss"] == pytest.approx(wanted, abs=1e-5 if precision == "no" else 0.05)
    before, after = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert value.dtype == (torch.bfloat16 if short else torch.float32)
        tolerance = 0.0 if precision == "no" else 0.01
        assert torch.allclose(value.float(), before[name].float(), atol=tolerance), name


def sharding_ends() -> bool:
    """Once the strategy is gone, models of transformers are whole again."""
    from transformers import LlamaForCausalLM

    accelerator = make("zero3")
    made: Any = LlamaForCausalLM._from_config(llama_config())  # type: ignore[no-untyped-call]
    assert all(hasattr(p, "ds_id") for p in made.parameters())
    del accelerator, made
    whole: Any = LlamaForCausalLM._from_config(llama_config())  # type: ignore[no-untyped-call]
    return not any(hasattr(p, "ds_id") for p in whole.parameters())


def test_sharding_ends_with_its_accelerator() -> None:
    pytest.importorskip("transformers")
    assert run_on_ranks(2, sharding_ends) == [True, True]


# Several models


def beside_a_reference(strategy: str, sharded: bool) -> tuple[list[float], list[float]]:
    """A frozen model beside the trained one, whole or built sharded as well."""
    accelerator = make(strategy)
    with accelerator.init_module():
        reference: Any = TinyTransformer(seed=5)
    if not sharded:
        reference = TinyTransformer(seed=5)
    model: Any = TinyTransformer()
    model, optimizer = accelerator.prepare(model, adamw(model))
    reference = accelerator.prepare_model(reference.requires_grad_(False), evaluation_mode=True)
    losses, references = [], []
    for seed in range(3):
        tokens = batch_of(accelerator, seed)
        with torch.no_grad():
            other = token_losses(reference(tokens), tokens).mean()
        references.append(float(accelerator.reduce(other, "mean")))
        losses.append(step(accelerator, model, optimizer, seed))
    return losses, references


@pytest.mark.parametrize(("strategy", "sharded"), with_deepspeed([("zero2", False), ("zero3", False), ("zero3", True)]))
def test_a_frozen_reference_beside_the_trained_model(strategy: str, sharded: bool) -> None:
    frozen = TinyTransformer(seed=5)
    with torch.no_grad():
        wanted = [float(token_losses(frozen(t), t).mean()) for t in (make_tokens(4, seed=s) for s in range(3))]
    for losses, references in run_on_ranks(2, beside_a_reference, strategy, sharded):
        assert losses == pytest.approx(plain_losses(3), abs=1e-5)
        assert references == pytest.approx(wanted, abs=1e-5)


def two_trained(strategy: str) -> tuple[list[float], list[float], str]:
    accelerator = make(strategy)
    one: Any = TinyTransformer()
    two: Any = TinyTransformer()
    one, two, first, second = accelerator.prepare(one, two, adamw(one), adamw(two))
    losses = (
        [step(accelerator, one, first, s) for s in range(3)],
        [step(accelerator, two, second, s) for s in range(3)],
    )
    tokens = batch_of(accelerator)
    both = token_losses(one(tokens), tokens).mean() + token_losses(two(tokens), tokens).mean()
    with pytest.raises(SteppingError) as error:
        accelerator.backward(both)
    return *losses, str(error.value)


@pytest.mark.parametrize("strategy", [*with_deepspeed(["zero2"]), *slowly(with_deepspeed(["zero3"]))])
def test_two_trained_models(strategy: str) -> None:
    for one, two, message in run_on_ranks(2, two_trained, strategy):
        assert one == pytest.approx(plain_losses(3), abs=1e-5)
        assert two == pytest.approx(plain_losses(3), abs=1e-5)
        assert "several trained models: TinyTransformer, TinyTransformer" in message


# Parts of the configuration that reach the engine


def leaves(name: str) -> str:
    accelerator = make("zero3", deepspeed_plugin={"transformer_moe_cls_names": (name,)})
    model: Any = TinyTransformer()
    try:
        model, optimizer = accelerator.prepare(model, adamw(model))
    except PrepareError as error:
        return str(error)
    from deepspeed.utils import z3_leaf_module

    marked = [type(m).__name__ for m in model.modules() if z3_leaf_module(m)]
    step(accelerator, model, optimizer)
    return ",".join(marked)


def test_mixture_blocks_are_gathered_whole() -> None:
    assert run_on_ranks(2, leaves, "Block") == ["Block,Block,Block"] * 2
    assert "Its classes are" in run_on_ranks(2, leaves, "Blok")[0]


def engine_told() -> dict[str, Any]:
    described = {
        "zero_optimization": {"stage": 2, "allgather_bucket_size": 1000},
        "communication_data_type": "fp32",
        "activation_checkpointing": {"partition_activations": True, "number_checkpoints": 3},
        "steps_per_print": 17,
    }
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16", deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=described)
    )
    model: Any = TinyTransformer()
    model, _ = accelerator.prepare(model, adamw(model))
    from deepspeed.runtime.activation_checkpointing import checkpointing

    found = {
        "communication": str(model.communication_data_type),
        "bucket": model.zero_allgather_bucket_size(),
        "print": model.steps_per_print(),
        "clip": model.gradient_clipping(),
        "accumulation": model.gradient_accumulation_steps(),
        "checkpoint": (checkpointing.PARTITION_ACTIVATIONS, checkpointing.num_layers),
    }
    checkpointing.reset()
    checkpointing.PARTITION_ACTIVATIONS = False
    return found


def test_the_rest_of_the_json_reaches_the_engine() -> None:
    for found in run_on_ranks(2, engine_told):
        assert found["communication"] == "torch.float32"
        assert (found["bucket"], found["print"]) == (1000, 17)
        assert (found["clip"], found["accumulation"]) == (0.0, 1), "those are paceline's"
        assert found["checkpoint"] == (True, 3)
