"""The Trainer's loss without logits: the same training as with them, under every strategy."""

from __future__ import annotations

import contextlib
import gc
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.errors import PrepareError
from paceline.trainer import Trainer, TrainingArguments
from tests.support.engines import slowly, with_deepspeed
from tests.support.ranks import run_on_ranks

pytest.importorskip("transformers", reason="pip install 'paceline[transformers]'")

CLASSES = 97
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}},
    "head as a unit": {
        "fsdp": True,
        "fsdp_config": {
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "Linear"],
            "activation_checkpointing": False,
        },
    },
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}},
}


class Texts(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows whose number of targets differs widely."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, CLASSES, (12,), generator=torch.Generator().manual_seed(index))
        labels = tokens.clone()
        labels[: (index * 5) % 12] = -100
        return {"input_ids": tokens, "labels": labels}


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    # A run under ZeRO-3 that an earlier test left in a circle makes transformers shard what one rank builds.
    gc.collect()
    torch.manual_seed(0)
    sizes = {"vocab_size": CLASSES, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes}))


def train(model: Any, folder: str, kind: type[Trainer] = Trainer, **settings: Any) -> tuple[list[float], str, Any]:
    """Losses and gradient norms of every step, and what was printed."""
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        trainer = kind(model, arguments, train_dataset=Texts())
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [entry[name] for entry in log for name in ("loss", "grad_norm")], printed.getvalue(), trainer


def on_rank(chunked: bool, folder: str, layout: dict[str, Any]) -> tuple[list[float], int]:
    """The numbers of a training, and how often all logits were computed in it."""
    model = llama(tie_word_embeddings="head" not in str(layout) and "Linear" not in str(layout))
    called = []
    dense = model.lm_head.forward
    found, _, trainer = train(model, folder, chunked_loss=chunked, **layout)
    assert trainer.model.lm_head.forward == dense, "restored"
    called.append(model.loss_function.__name__)
    assert called == ["ForCausalLMLoss"]
    return found, len(found)


@pytest.mark.parametrize(
    "layout",
    [*slowly(["ddp", "fsdp"]), "head as a unit", *with_deepspeed(["zero3"]), *slowly(with_deepspeed(["zero2"]))],
)
def test_every_strategy_trains_the_same_without_logits(layout: str, tmp_path: Path) -> None:
    dense, chunked = (
        run_on_ranks(2, on_rank, choice, str(tmp_path / str(choice)), LAYOUTS[layout])[0][0] for choice in (False, True)
    )
    assert len(chunked) == 8
    assert chunked == pytest.approx(dense, rel=2e-5)


def test_no_step_of_the_training_computes_all_logits(tmp_path: Path) -> None:
    model = llama()
    shapes: list[tuple[int, ...]] = []
    original = torch.nn.functional.cross_entropy

    def watched(source: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        shapes.append(tuple(source.shape))
        return original(source, *rest, **more)

    functional: Any = torch.nn.functional
    functional.cross_entropy = watched
    try:
        train(model, str(tmp_path), chunked_loss=True)
    finally:
        functional.cross_entropy = original
    assert len(shapes) == 1, "only the trial of the first batch"


class Capped:
    """Makes a model that changes its logits by a function that is nearly the identity for small ones."""

    @staticmethod
    def model() -> Any:
        model = llama()
        head = model.lm_head

        class Head(torch.nn.Module):
            """Hands on to the linear layer, then caps."""

        original = type(model).forward

        def forward(self: Any, **inputs: Any) -> Any:
            loss_function = self.loss_function
            self.__dict__["_loss_function"] = lambda logits, **rest: loss_function(
                logits=30 * torch.tanh(logits / 30), **rest
            )
            try:
                return original(self, **inputs)
            finally:
                self.__dict__["_loss_function"] = loss_function

        kind = type("CappedLlama", (type(model),), {"forward": forward})
        model.__class__ = kind
        assert head is model.lm_head
        return model


def test_a_model_that_changes_its_logits_keeps_the_dense_loss(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="changes its logits before the loss"):
        train(Capped.model(), str(tmp_path / "a"), chunked_loss=True)
    dense = train(Capped.model(), str(tmp_path / "b"), chunked_loss=False)[0]
    assert train(Capped.model(), str(tmp_path / "c"))[0] == dense


def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=CLASSES, head_dim=8, **SIZES))


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=CLASSES, num_local_experts=4, output_router_logits=True, **SIZES)
    return MixtralForCausalLM(config)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": CLASSES, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes))


def lora() -> Any:
    peft = pytest.importorskip("peft", reason="pip install 'paceline[peft]'")
    base = llama()
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


# PEFT asks transformers under an older name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("make", [mixtral, gpt2, lora])
def test_other_models_train_the_same(make: Any, tmp_path: Path) -> None:
    """With a router's loss beside, with a loss of no name, and inside of adapters."""
    dense = train(make(), str(tmp_path / "a"), chunked_loss=False)[0]
    assert train(make(), str(tmp_path / "b"), chunked_loss=True)[0] == pytest.approx(dense, rel=1e-4)


def test_soft_capped_logits_are_noticed_though_the_first_loss_is_nearly_the_same(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="Gemma2ForCausalLM changes its logits before the loss"):
        train(gemma2(), str(tmp_path), chunked_loss=True)


class ReadsLogits(Trainer):
    """Computes its own loss."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        assert outputs["logits"].shape[-1] == CLASSES
        return (loss, outputs) if return_outputs else loss


def own_head() -> Any:
    model = llama(tie_word_embeddings=False)
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, CLASSES))
    return model


def hooked_head() -> Any:
    model = llama()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    return model


@pytest.mark.parametrize(
    ("make", "kind", "settings", "words"),
    [
        (llama, ReadsLogits, {}, "overrides compute_loss"),
        (llama, Trainer, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        (own_head, Trainer, {}, "is a Sequential"),
        (hooked_head, Trainer, {}, "forward hooks"),
    ],
)
def test_what_needs_the_logits_is_refused(make: Any, kind: Any, settings: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=words):
        train(make(), str(tmp_path), kind, chunked_loss=True, **settings)


def test_a_large_vocabulary_is_chunked_by_itself_and_an_obstacle_is_said(tmp_path: Path) -> None:
    large = {"vocab_size": 16_384}
    found, printed, _ = train(llama(**large), str(tmp_path / "a"))
    assert "all logits" not in printed
    dense, _, _ = train(llama(**large), str(tmp_path / "b"), chunked_loss=False)
    assert found == pytest.approx(dense, rel=2e-5)
    _, printed, _ = train(llama(**large), str(tmp_path / "c"), label_smoothing_factor=0.1)
    assert "The loss is computed from all logits at once: label_smoothing_factor" in printed


def test_evaluations_during_the_training_get_logits(tmp_path: Path) -> None:
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {}

    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=2, eval_strategy="steps", eval_steps=1, chunked_loss=True,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    Trainer(llama(), arguments, train_dataset=Texts(), eval_dataset=Texts(), compute_metrics=metrics).train()
    assert seen == [(32, 12, CLASSES)] * 2
