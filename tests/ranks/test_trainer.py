"""The Trainer on real ranks: the same training on any layout, and after a resume."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from paceline import Trainer, TrainingArguments
from paceline.config import resolve
from paceline.errors import PREEMPTED, ConfigError
from tests.ranks.trainer_script import CHANGES, Asked
from tests.support.ranks import run_on_ranks
from tests.support.trainer import Sentences, arguments, farthest, run, tagger, timeless

DEEPSPEED = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {}),
    "fsdp": (2, {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Block"], "fsdp_version": 2}}),
    "deepspeed": (2, {"deepspeed": DEEPSPEED}),
}
WHOLE = {"global_batch_size": 8, "eval_strategy": "steps", "eval_steps": 5, "lr_scheduler_type": "cosine"}


def train(
    changes: dict[str, Any], folder: str, resume: bool | str | None = None, samples: int = 48
) -> tuple[list[dict[str, Any]], str]:
    log, trainer = run({**WHOLE, **changes}, folder, resume=resume, samples=samples)
    return log, trainer.accelerator.strategy.name


@pytest.mark.parametrize("most", [4, 1], ids=["accumulation 1 or 2", "accumulation 4 or 8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_training_on_every_layout(layout: str, most: int, tmp_path: Path) -> None:
    if layout == "deepspeed":
        pytest.importorskip("deepspeed", reason="pip install 'paceline[deepspeed]'")
    ranks, changes = LAYOUTS[layout]
    # Two samples are left for the last step of a pass: fewer than ranks x micro-batch.
    batch, uneven = {"per_device_train_batch_size": most}, 50
    [(alone, _)] = run_on_ranks(1, train, batch, str(tmp_path / "alone"), None, uneven)
    together, strategy = run_on_ranks(ranks, train, {**batch, **changes}, str(tmp_path / "together"), None, uneven)[0]
    assert strategy == layout
    assert farthest(alone, together) < 1e-5
    assert [entry["eval_samples"] for entry in alone if "eval_samples" in entry] == [21.0] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"dataloader_drop_last": True},
        {"accelerator_config": {"split_batches": True}},
        {"accelerator_config": {"dispatch_batches": True}},
        {"train_sampling_strategy": "group_by_length"},
        {"label_smoothing_factor": 0.1},
    ],
    ids=str,
)
def test_the_same_training_on_any_number_of_ranks(more: dict[str, Any], tmp_path: Path) -> None:
    """55 samples in steps of 12: the last step of a pass has 7, or is left out as a whole."""
    said = {"global_batch_size": 12, "per_device_train_batch_size": 3, "num_train_epochs": 2, "max_steps": -1, **more}
    [(alone, _)] = run_on_ranks(1, train, said, str(tmp_path / "1"), None, 55)
    assert max(entry["step"] for entry in alone) == (8 if "dataloader_drop_last" in more else 10)
    assert all(entry["eval_samples"] == 21 for entry in alone if "eval_samples" in entry)
    for ranks in (2, 4):
        together, _ = run_on_ranks(ranks, train, said, str(tmp_path / str(ranks)), None, 55)[0]
        assert farthest(alone, together) < 1e-5


def test_a_mean_of_means_is_another_training(tmp_path: Path) -> None:
    """The known-wrong variant: without weights the split over ranks and micro-batches shows."""
    wrong = {"average_tokens_across_devices": False, "per_device_train_batch_size": 1}
    [(alone, _)] = run_on_ranks(1, train, {**wrong, "per_device_train_batch_size": 8}, str(tmp_path / "alone"))
    together, _ = run_on_ranks(2, train, wrong, str(tmp_path / "together"))[0]
    assert farthest(alone, together) > 1e-3


def resumed(changes: dict[str, Any], folder: str, drop: str) -> list[dict[str, Any]]:
    """Train to the end, forget what came after a checkpoint, and train to the end again."""
    whole, _ = train(changes, folder)
    for path in Path(folder).glob("checkpoint-*"):
        if path.name == drop:
            break
    else:
        raise AssertionError(f"no {drop} in {folder}")
    again, _ = train(changes, folder, resume=str(Path(folder) / drop))
    last = whole[-1]["train_loss"]
    assert abs(again[-1]["train_loss"] - last) < 1e-6
    return [*whole, *again]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_training_is_the_one_that_never_stopped(layout: str, tmp_path: Path) -> None:
    if layout == "deepspeed":
        pytest.importorskip("deepspeed", reason="pip install 'paceline[deepspeed]'")
    ranks, changes = LAYOUTS[layout]
    # Six steps a pass: the checkpoint after step 9 lies within the second one, and within a log interval of 2.
    changes = {**changes, "save_strategy": "steps", "save_steps": 9, "logging_steps": 2, "max_steps": 14}
    both = run_on_ranks(ranks, resumed, changes, str(tmp_path), "checkpoint-9")[0]
    half = len(both) // 2
    assert farthest(both[:half], both[half:]) < (1e-6 if layout == "deepspeed" else 1e-9)


def test_true_takes_the_newest_whole_checkpoint_on_another_number_of_ranks(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 6, "max_steps": 18, "per_device_train_batch_size": 2}
    folder = tmp_path / "run"
    whole, _ = run_on_ranks(2, train, changes, str(folder))[0]
    shutil.rmtree(folder / "checkpoint-18")
    (folder / "checkpoint-12" / "manifest.json").unlink()
    # The same samples in each micro-batch of all ranks together.
    [(again, _)] = run_on_ranks(1, train, {**changes, "per_device_train_batch_size": 4}, str(folder), True)
    assert farthest(whole, again) < 1e-5
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        "checkpoint-12",
        "checkpoint-18",
        "checkpoint-6",
    ]


def test_the_same_step_split_otherwise_goes_on_within_a_pass(tmp_path: Path) -> None:
    """2 ranks x 4 rows, then 1 rank x 4 rows x 2 micro-batches, then 2 ranks x 2 rows x 2: six steps a pass."""
    changes = {"save_strategy": "steps", "save_steps": 4, "max_steps": 14, "per_device_train_batch_size": 4}
    whole, _ = run_on_ranks(2, train, changes, str(tmp_path / "whole"))[0]
    folder = str(tmp_path / "run")
    run_on_ranks(2, train, changes, folder)
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    shutil.rmtree(tmp_path / "run" / "checkpoint-14")
    [(alone, _)] = run_on_ranks(1, train, {**changes, "save_steps": 2}, str(folder), True)
    assert farthest(whole, alone) < 1e-6
    smaller = {**changes, "per_device_train_batch_size": 2}
    back, _ = run_on_ranks(2, train, smaller, folder, str(tmp_path / "run" / "checkpoint-10"))[0]
    assert farthest(whole, back) < 1e-6
    with pytest.raises(AssertionError, match="an optimizer step must keep its samples"):
        run_on_ranks(1, train, {**smaller, "global_batch_size": 4}, folder, str(tmp_path / "run" / "checkpoint-10"))


def best(changes: dict[str, Any], folder: str) -> tuple[str | None, list[str], float, float]:
    saved = {"save_strategy": "steps", "save_steps": 5, "load_best_model_at_end": True, "save_total_limit": 1}
    _, trainer = run({**WHOLE, "learning_rate": 0.3, **saved, **changes}, folder)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    measured = trainer.evaluate()["eval_loss"]
    left = sorted(path.name for path in Path(folder).glob("checkpoint-*"))
    assert trainer.state.best_global_step == min(losses, key=lambda step: losses[step])
    return trainer.state.best_model_checkpoint, left, measured, min(losses.values())


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights only"])
def test_the_best_is_kept_and_loaded(layout: str, weights_only: bool, tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[layout]
    changes = {**changes, "save_only_model": weights_only}
    folder, left, measured, least = run_on_ranks(ranks, best, changes, str(tmp_path))[0]
    assert folder is not None
    assert Path(folder).name in left
    assert len(left) <= 2
    assert measured == pytest.approx(least, abs=1e-6)


def script(folder: Path, step: int) -> int:
    """Run the script that is asked to make room after a step; 0 resumes it."""
    launch = [sys.executable, "-m", "paceline", "launch", "--cpu", "--num_processes", "2"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PACELINE_")}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*launch, str(root / "tests" / "ranks" / "trainer_script.py"), str(folder), str(step)],
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode in (0, PREEMPTED), done.stderr[-3000:]
    return done.returncode


def asked_to_make_room(folder: str) -> tuple[object, list[dict[str, Any]], list[dict[str, Any]]]:
    """The exit code of a training that gets a signal, the log of the one that goes on, and of one that got none."""
    try:
        run(CHANGES, f"{folder}/run", callbacks=[Asked(60)])
    except SystemExit as stop:
        code = stop.code
    again, _ = run(CHANGES, f"{folder}/run", resume=True)
    whole, _ = run(CHANGES, f"{folder}/whole")
    return code, again, whole


def check_room_made(folder: Path, again: list[dict[str, Any]], whole: list[dict[str, Any]]) -> None:
    saved = min(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))
    assert 60 <= saved < 280
    assert farthest(whole, again) < 1e-9


def test_a_signal_saves_and_the_rest_is_the_same(tmp_path: Path) -> None:
    for code, again, whole in run_on_ranks(2, asked_to_make_room, str(tmp_path)):
        assert code == PREEMPTED
        check_room_made(tmp_path / "run", again, whole)


@pytest.mark.slow
def test_a_signal_ends_a_launch_with_its_own_code(tmp_path: Path) -> None:
    assert script(tmp_path / "run", 60) == PREEMPTED
    assert script(tmp_path / "run", 0) == 0
    assert script(tmp_path / "whole", 5000) == 0
    again, whole = (json.loads((tmp_path / name / "log.json").read_text(encoding="utf-8")) for name in ("run", "whole"))
    check_room_made(tmp_path / "run", again, whole)


SECTIONS = {
    **DEEPSPEED,
    "zero_optimization": {"stage": 3},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
            "warmup_type": "linear",
        },
    },
}


# The course that this schedule of DeepSpeed's takes.
LINEAR = {**WHOLE, "lr_scheduler_type": "linear"}


def described(folder: str) -> tuple[list[float], list[float], dict[str, Any]]:
    changes = {**LINEAR, "deepspeed": SECTIONS, "warmup_steps": 4, "max_steps": 16, "eval_strategy": "no"}
    log, trainer = run(changes, folder)
    steps = [entry for entry in log if "loss" in entry]
    settings = trainer.accelerator.strategy.settings
    return [entry["loss"] for entry in steps], [entry["learning_rate"] for entry in steps], settings


def test_what_a_deepspeed_configuration_leaves_to_the_arguments(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="pip install 'paceline[deepspeed]'")
    losses, rates, settings = run_on_ranks(2, described, str(tmp_path))[0]
    assert settings["optimizer"]["params"]["lr"] == max(rates) == 1e-2
    assert settings["optimizer"]["params"]["weight_decay"] == 0.1
    assert settings["train_batch_size"] == 8
    assert settings["gradient_clipping"] == 1.0
    # DeepSpeed's scheduler begins one step late.
    assert rates.index(max(rates)) in (4, 5)
    assert rates[0] < rates[3] < max(rates) > rates[10] > rates[15]
    assert losses[-1] < losses[0] - 0.5


ADAMW = {"type": "AdamW", "params": {"torch_adam": True}}
TOLD = {
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 0.3,
    "warmup_steps": 3,
    "per_device_train_batch_size": 2,
    "max_steps": 8,
    "eval_strategy": "no",
}


@pytest.mark.parametrize("more", [{}, {"global_batch_size": None, "gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_arguments_act_where_a_deepspeed_configuration_is_silent(
    stage: int, more: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="pip install 'paceline[deepspeed]'")
    silent = {"zero_optimization": {"stage": stage}, "optimizer": ADAMW}
    plain, _ = run_on_ranks(2, train, {**TOLD, **more}, str(tmp_path / "ddp"))[0]
    found, strategy = run_on_ranks(2, train, {**TOLD, **more, "deepspeed": silent}, str(tmp_path / "zero"))[0]
    assert strategy == "deepspeed"
    assert len({entry["learning_rate"] for entry in plain if "loss" in entry}) > 5
    assert farthest(plain, found) < 1e-5


def silent_on_precision(folder: str) -> dict[str, Any]:
    silent = {"zero_optimization": {"stage": 2}, "optimizer": ADAMW}
    _, trainer = run({**WHOLE, **TOLD, "max_steps": 2, "bf16": True, "deepspeed": silent}, folder)
    settings: dict[str, Any] = trainer.accelerator.strategy.settings
    return settings


def test_arguments_say_the_precision_where_a_deepspeed_configuration_is_silent(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="pip install 'paceline[deepspeed]'")
    settings = run_on_ranks(2, silent_on_precision, str(tmp_path))[0]
    assert settings["bf16"]["enabled"] is True
    assert settings["optimizer"]["params"]["betas"] == (0.8, 0.9)
    assert settings["gradient_clipping"] == 0.3
    assert (settings["train_batch_size"], settings["gradient_accumulation_steps"]) == (8, 2)


def described_by_launcher(folder: str) -> dict[str, Any]:
    """What the engine was told where the launcher named DeepSpeed's JSON, and the arguments none."""
    flags = {"use_deepspeed": True, "cpu": True, "deepspeed_config_file": json.dumps(SECTIONS)}
    os.environ["PACELINE_CONFIG"] = resolve(flags=flags, env={}, file=None).to_json()
    try:
        _, trainer = run({**LINEAR, "use_cpu": False, "max_steps": 3, "eval_strategy": "no"}, folder)
    finally:
        del os.environ["PACELINE_CONFIG"]
    settings: dict[str, Any] = trainer.accelerator.strategy.settings
    if trainer.accelerator.is_main_process:
        record = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
        assert record["engine_settings"] == json.loads(json.dumps(settings))
    return settings


def test_a_launcher_may_name_the_deepspeed_configuration(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="pip install 'paceline[deepspeed]'")
    for settings in run_on_ranks(2, described_by_launcher, str(tmp_path)):
        assert settings["optimizer"]["params"]["lr"] == 1e-2
        assert settings["scheduler"]["params"]["total_num_steps"] == 3


def two_descriptions(changes: dict[str, Any], folder: str) -> list[str]:
    optimizer = {"type": "AdamW", "params": {"torch_adam": True}}
    scheduler = {"type": "WarmupDecayLR", "params": {}}
    described = {"zero_optimization": {"stage": 2}, "optimizer": optimizer, "scheduler": scheduler}
    args = TrainingArguments(**arguments(folder, deepspeed=described, **changes))
    try:
        Trainer(tagger(), args, train_dataset=Sentences(8, 1))
    except ConfigError as error:
        return [problem.key for problem in error.problems]
    return []


def test_an_argument_that_a_deepspeed_section_would_override_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="pip install 'paceline[deepspeed]'")
    clashes = {"optim": "sgd", "optim_args": "momentum=0.9", "lr_scheduler_type": "cosine"}
    found = run_on_ranks(2, two_descriptions, {**clashes, "lr_scheduler_kwargs": {"num_cycles": 1}}, str(tmp_path))
    assert found == [["optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs"]] * 2
    agreeing = {"optim": "adamw_torch", "lr_scheduler_type": "linear", "warmup_steps": 2}
    assert run_on_ranks(2, two_descriptions, agreeing, str(tmp_path)) == [[], []]


class Endless(IterableDataset[dict[str, torch.Tensor]]):
    """Samples without a length."""

    def __iter__(self) -> Any:
        rows = Sentences(48, 1)
        return (rows[index] for index in range(48))


class Penalised(Trainer):
    """Overrides the loss with a plain mean."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = 2 * outputs["loss"]
        return (loss, outputs) if return_outputs else loss


def unsized(folder: str, changes: dict[str, Any]) -> list[float]:
    made = TrainingArguments(**arguments(folder, max_steps=9, **changes))
    trainer = Penalised(tagger(), made, train_dataset=Endless())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_streams_and_a_loss_of_ones_own(tmp_path: Path) -> None:
    batch = {"global_batch_size": 8, "per_device_train_batch_size": 2}
    [alone] = run_on_ranks(1, unsized, str(tmp_path), {**batch, "per_device_train_batch_size": 8})
    assert len(alone) == 9, "a pass has six steps"
    assert alone[-1] < alone[0]
    together = run_on_ranks(2, unsized, str(tmp_path), batch)[0]
    assert len(together) == 9
    with pytest.raises(Exception, match="max_steps"):
        run_on_ranks(1, without_steps, str(tmp_path))


def without_steps(folder: str) -> None:
    Trainer(tagger(), TrainingArguments(**arguments(folder, max_steps=-1)), train_dataset=Endless()).train()


def plateau(folder: str) -> list[dict[str, Any]]:
    changes: dict[str, Any] = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "mode": "max"},
    }
    changes |= {"save_strategy": "steps", "save_steps": 5, "learning_rate": 0.3}
    return resumed(changes, folder, "checkpoint-10")


def test_a_rate_that_follows_the_loss_is_resumed(tmp_path: Path) -> None:
    both = run_on_ranks(2, plateau, str(tmp_path))[0]
    half = len(both) // 2
    assert farthest(both[:half], both[half:]) < 1e-9
    rates = [entry["learning_rate"] for entry in both[:half] if "learning_rate" in entry]
    assert rates[0] == 0.3
    assert rates[-1] < 0.3


def grouped(folder: str) -> tuple[list[float], list[int]]:
    data = Sentences(48, 1)
    changes = {"max_steps": 6, "train_sampling_strategy": "group_by_length", "global_batch_size": 8}
    made = TrainingArguments(**arguments(folder, **changes))
    trainer = Trainer(tagger(), made, train_dataset=data)
    data.read.clear()
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], data.read


def test_batches_of_like_lengths_are_shared_out(tmp_path: Path) -> None:
    [(alone, read)] = run_on_ranks(1, grouped, str(tmp_path))
    ranks = run_on_ranks(2, grouped, str(tmp_path))
    assert ranks[0][0] == pytest.approx(alone, abs=1e-5)
    assert set(ranks[0][1]) | set(ranks[1][1]) == set(read) == set(range(48))


def configured(config: dict[str, Any], folder: str) -> tuple[list[dict[str, Any]], int]:
    """Train with settings of the Accelerator; also how many samples this rank read itself."""
    data = Sentences(44, 1)
    changes = {"global_batch_size": 8, "accelerator_config": config, "num_train_epochs": 2, "max_steps": -1}
    made = TrainingArguments(**arguments(folder, **changes))
    trainer = Trainer(tagger(), made, train_dataset=data, eval_dataset=Sentences(21, 2))
    data.read.clear()
    trainer.train()
    trainer.evaluate()
    return [timeless(entry) for entry in trainer.state.log_history], len(data.read)


def test_every_setting_of_the_accelerator_acts(tmp_path: Path) -> None:
    folder = str(tmp_path)
    plain = [log for log, _ in run_on_ranks(2, configured, {}, folder)]
    split = run_on_ranks(2, configured, {"split_batches": True}, folder)
    assert farthest(split[0][0], plain[0]) < 1e-6, "as many rows for each rank, read as one batch"
    (sent, _), (_, read) = run_on_ranks(2, configured, {"dispatch_batches": True}, folder)
    assert farthest(sent, plain[0]) < 1e-6
    assert read == 0, "rank 0 reads for all"
    drawn = run_on_ranks(2, configured, {"use_seedable_sampler": False}, folder)[0][0]
    assert farthest(drawn, plain[0]) > 1e-3, "another order"
    each = {"gradient_accumulation_kwargs": {"sync_each_batch": True}, "non_blocking": True}
    assert farthest(run_on_ranks(2, configured, each, folder)[0][0], plain[0]) < 1e-6
    with pytest.raises(AssertionError, match="even_batches: False, and ranks have 6, 5 batches"):
        run_on_ranks(2, configured, {"even_batches": False}, folder)


def before_and_after(folder: str, changes: dict[str, Any]) -> tuple[float, float, float, list[int]]:
    made = TrainingArguments(**arguments(folder, max_steps=6, **changes))
    trainer = Trainer(tagger(), made, train_dataset=Sentences(48, 1), eval_dataset=Sentences(21, 2))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    found = trainer.predict(Sentences(21, 2))
    labels = torch.stack([Sentences(21, 2)[index]["labels"] for index in range(21)])
    assert torch.equal(torch.from_numpy(found.label_ids), labels), "in order, each once"
    return before, trainer.evaluate()["eval_loss"], found.metrics["test_loss"], list(found.predictions.shape)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_evaluation_before_and_after_training(layout: str, tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[layout]
    batch = {"global_batch_size": 8}
    [alone] = run_on_ranks(1, before_and_after, str(tmp_path), batch)
    together = run_on_ranks(ranks, before_and_after, str(tmp_path), {**batch, **changes})[0]
    assert together[:3] == pytest.approx(alone[:3], abs=1e-5)
    assert alone[1] == alone[2] < alone[0]
    assert together[3] == alone[3] == [21, 8, 61]
