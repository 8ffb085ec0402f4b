"""Options that change how a model is run, each against a run without it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paceline import Trainer, TrainingArguments
from paceline.errors import ConfigError, PrepareError
from tests.support.trainer import Sentences, Tagger, arguments, farthest, run, tagger


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_compiling_compiles_each_block_and_changes_nothing(tmp_path: Path) -> None:
    plain, _ = run({"max_steps": 4}, str(tmp_path))
    log, trainer = run({"max_steps": 4, "torch_compile_backend": "eager"}, str(tmp_path))
    assert farthest(plain, log) < 1e-5
    blocks: Any = trainer.model.blocks
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert trainer.model._compiled_call_impl is None, "only what repeats"


class Embedded(Tagger):
    """One that says where its embeddings are."""

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens


def embedded() -> nn.Module:
    torch.manual_seed(3)
    return Embedded()


def test_noise_on_embeddings_is_there_while_training_only(tmp_path: Path) -> None:
    changes = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    plain, _ = run(changes, str(tmp_path), make=embedded)
    small, trainer = run({**changes, "neftune_noise_alpha": 1e-9}, str(tmp_path), make=embedded)
    noisy, _ = run({**changes, "neftune_noise_alpha": 5.0}, str(tmp_path), make=embedded)
    assert farthest(plain, small) < 1e-5
    assert farthest(plain, noisy) > 1e-3
    assert not trainer.model.tokens._forward_hooks, "nothing stays on the model"
    with pytest.raises(PrepareError, match="has no get_input_embeddings"):
        run({**changes, "neftune_noise_alpha": 5.0}, str(tmp_path))


@pytest.mark.parametrize(("name", "dtype"), [("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16)])
def test_evaluating_in_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def evaluated(**more: Any) -> tuple[dict[str, float], Any]:
        made = TrainingArguments(**arguments(str(tmp_path), **more))
        trainer = Trainer(tagger(), made, eval_dataset=Sentences(21, 2))
        return trainer.evaluate(), trainer

    whole, _ = evaluated()
    half, trainer = evaluated(**{name: True})
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {dtype}
    assert half["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-2)
    assert half["eval_loss"] != whole["eval_loss"]


def test_metrics_get_the_inputs_and_losses_that_were_asked_for(tmp_path: Path) -> None:
    seen: list[Any] = []

    def measure(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {}

    for asked in ([], ["inputs", "loss"]):
        made = TrainingArguments(**arguments(str(tmp_path), include_for_metrics=asked))
        metrics = Trainer(tagger(), made, eval_dataset=Sentences(21, 2), compute_metrics=measure).evaluate()
    bare, full = seen
    assert bare.inputs is None
    assert bare.losses is None
    assert (full.inputs == Sentences(21, 2).tokens.numpy()).all()
    assert full.losses.mean() == pytest.approx(metrics["eval_loss"], rel=0.1)


def test_fp16_on_a_processor_scales_the_loss(tmp_path: Path) -> None:
    plain, _ = run({"max_steps": 6}, str(tmp_path))
    log, trainer = run({"max_steps": 6, "fp16": True}, str(tmp_path))
    assert trainer.accelerator.scaler is not None
    assert losses(log) == pytest.approx(losses(plain), rel=2e-2)
    assert losses(log) != losses(plain)


def optimizers() -> list[Any]:
    """Optimizers of packages that need not be installed."""
    names = {
        "schedulefree": ["schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"],
        "bitsandbytes": ["adamw_bnb_8bit", "lion_8bit"],
        "torchao": ["adamw_torch_8bit", "adamw_torch_4bit"],
    }
    return [
        pytest.param(
            name,
            marks=[
                pytest.mark.skipif(
                    importlib.util.find_spec(package) is None,
                    reason=f"{package} is not installed: pip install 'paceline[{package}]'",
                ),
                *([pytest.mark.slow] if package == "torchao" else []),  # it compiles its step
            ],
        )
        for package, several in names.items()
        for name in several
    ]


@pytest.mark.filterwarnings("ignore")  # of these packages, and of torch's compiler
@pytest.mark.parametrize("name", optimizers())
def test_optimizers_of_other_packages_learn_and_resume(name: str, tmp_path: Path) -> None:
    changes = {"optim": name, "max_steps": 24, "eval_strategy": "steps", "eval_steps": 12}
    changes |= {"learning_rate": {"schedule_free_sgd": 3.0, "schedule_free_radam": 0.2}.get(name, 0.03)}
    changes |= {"save_strategy": "steps", "save_steps": 12}
    log, trainer = run(changes, str(tmp_path))
    # Plain SGD learns less in so few steps.
    assert losses(log)[-1] < (1.0 if "sgd" in name else 0.8) * losses(log)[0]
    # After the end the weights are those that were evaluated last.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1], rel=1e-5
    )
    again, _ = run(changes, str(tmp_path), resume=str(tmp_path / "checkpoint-12"))
    assert farthest(log, again) < 1e-5


def test_a_state_configured_before_is_used_or_missed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no process group is open"):
        run({"accelerator_config": {"use_configured_state": True}}, str(tmp_path))
