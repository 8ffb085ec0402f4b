"""PEFT models through the Trainer: adapter files that PEFT opens, small checkpoints, and an exact resume."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset

from paceline import Accelerator, Trainer, TrainingArguments
from paceline.errors import PacelineError
from tests.support.engines import slowly
from tests.support.ranks import run_on_ranks
from tests.support.trainer import Tagger

for package in ("peft", "transformers"):
    pytest.importorskip(package, reason=f"pip install {package}")

VOCABULARY = 32
ZERO: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "ddp": (2, {}),
    "fsdp": (2, {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}),
    "zero2": (2, {"deepspeed": {**ZERO, "zero_optimization": {"stage": 2}}}),
    "zero3": (2, {"deepspeed": {**ZERO, "zero_optimization": {"stage": 3}}}),
}


class Runs(Dataset[dict[str, torch.Tensor]]):
    """Rows of numbers that follow each other."""

    def __init__(self, size: int) -> None:
        self.ids = (torch.arange(size)[:, None] * 5 + torch.arange(8)) % VOCABULARY

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index].clone()}


def base() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes))


def adapted(**more: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    said = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "lora_dropout": 0.1, **more}
    return get_peft_model(base(), LoraConfig(**said))


def trained(folder: str, changes: dict[str, Any], resume: str | None = None, **more: Any) -> dict[str, Any]:
    said: dict[str, Any] = {
        "output_dir": folder,
        "global_batch_size": 8,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(**{**said, **changes})
    trainer = Trainer(adapted(**more), args, train_dataset=Runs(32), eval_dataset=Runs(8))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(f"{folder}/final")
        measured = trainer.evaluate()["eval_loss"]
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "measured": {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry},
        "best": trainer.state.best_model_checkpoint,
        "loaded": measured,
        "weights": {name: value.clone() for name, value in state.items() if "lora" in name or "saved" in name},
    }


def opened(folder: Path) -> float:
    """The loss of what PEFT makes of a folder."""
    # On a rank: PEFT asks transformers for what warns here.
    [loss] = run_on_ranks(1, loss_of, str(folder))
    return float(loss)


def loss_of(folder: str) -> float:
    from peft import PeftModel

    model = PeftModel.from_pretrained(base(), folder).eval()
    ids = Runs(8).ids
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("layout", ["single", "ddp", "fsdp", "zero2", *slowly(["zero3"])])
def test_adapters_are_saved_loaded_and_resumed(layout: str, tmp_path: Path) -> None:
    if layout.startswith("zero"):
        pytest.importorskip("deepspeed", reason="pip install 'paceline[deepspeed]'")
    ranks, changes = LAYOUTS[layout]
    folder = tmp_path / "run"
    whole = run_on_ranks(ranks, trained, str(folder), changes)[0]
    for name, loss in [("final", whole["loaded"])] + [(f"checkpoint-{s}", whole["measured"][s]) for s in (2, 4)]:
        assert opened(folder / name) == pytest.approx(loss, abs=1e-5)
        assert not (folder / name / "config.json").exists()
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE((folder / name / "adapter_model.safetensors").stat().st_mode) == 0o666 & ~umask
    assert not (folder / "final" / "model.safetensors").exists()
    held = load_file(folder / "checkpoint-2" / "model.safetensors")
    assert held.keys() == whole["weights"].keys()
    assert all("lora" in name for name in held), "the frozen base is where it came from"
    # Dropout goes on after an evaluation, and draws the same again.
    again = run_on_ranks(ranks, trained, str(tmp_path / "again"), changes, str(folder / "checkpoint-2"))[0]
    assert again["losses"] == whole["losses"]
    assert again["loaded"] == whole["loaded"] == min(whole["measured"].values())
    assert all(torch.equal(again["weights"][name], value) for name, value in whole["weights"].items())


@pytest.mark.parametrize("layout", ["single", "ddp", "fsdp"])
def test_the_best_adapters_are_loaded_from_weights_alone(layout: str, tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[layout]
    # The loss falls, so that the highest is not that of the last step.
    changes = {**changes, "save_only_model": True, "greater_is_better": True}
    found = run_on_ranks(ranks, trained, str(tmp_path), changes)[0]
    assert max(found["measured"], key=found["measured"].get) == 2
    assert Path(found["best"]).name == "checkpoint-2"
    assert found["loaded"] == pytest.approx(found["measured"][2], abs=1e-6)


def test_another_layout_goes_on_with_the_adapters(tmp_path: Path) -> None:
    ranks, changes = LAYOUTS["fsdp"]
    steady = {"lora_dropout": 0.0, "modules_to_save": ["lm_head"]}
    whole = run_on_ranks(ranks, with_more, str(tmp_path / "a"), changes, None, steady)[0]
    [alone] = run_on_ranks(1, with_more, str(tmp_path / "b"), {}, f"{tmp_path}/a/checkpoint-2", steady)
    assert alone["losses"] == pytest.approx(whole["losses"], abs=1e-5)
    assert any("modules_to_save" in name for name in load_file(tmp_path / "a" / "checkpoint-4" / "model.safetensors"))
    assert opened(tmp_path / "a" / "final") == pytest.approx(whole["loaded"], abs=1e-5)


def with_more(folder: str, changes: dict[str, Any], resume: str | None, more: dict[str, Any]) -> dict[str, Any]:
    return trained(folder, changes, resume, **more)


def test_other_adapters_are_no_place_to_go_on_from(tmp_path: Path) -> None:
    run_on_ranks(1, with_more, str(tmp_path / "a"), {}, None, {})
    more = {"target_modules": ["q_proj", "k_proj", "v_proj"]}
    with pytest.raises(AssertionError, match=r"optimizer has groups of .*k_proj"):
        run_on_ranks(1, with_more, str(tmp_path / "b"), {}, f"{tmp_path}/a/checkpoint-2", more)


def test_only_a_peft_model_has_adapters(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    with pytest.raises(PacelineError, match="save_adapter was called with a Tagger"):
        accelerator.save_adapter(accelerator.prepare(Tagger()), tmp_path)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's, of transformers
def test_columns_that_only_the_base_model_names_are_kept(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 1.0}
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, **sizes)
    ids = torch.randint(0, VOCABULARY, (8, 6))
    rows = [
        {"input_ids": row, "token_type_ids": (torch.arange(6) > 2).long(), "labels": torch.tensor(n % 2), "note": n}
        for n, row in enumerate(ids)
    ]
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    model = get_peft_model(BertForSequenceClassification(config), lora).eval()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    loss = Trainer(model, args, eval_dataset=rows).evaluate()["eval_loss"]
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "token_type_ids", "labels")}
    with torch.no_grad():
        assert loss == pytest.approx(model(**batch).loss.item(), abs=1e-6)
