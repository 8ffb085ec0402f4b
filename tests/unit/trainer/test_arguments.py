"""TrainingArguments: what they refuse, where they come from, and what they become."""

from __future__ import annotations

import copy
import json
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from paceline import Trainer, TrainingArguments
from paceline.config import resolve
from paceline.errors import ConfigError
from paceline.trainer.arguments.accelerator import accelerator_arguments, build_accelerator
from paceline.trainer.arguments.checks import find_problems
from tests.support.ranks import run_on_ranks

if TYPE_CHECKING:
    from collections.abc import Callable


def problems(**values: Any) -> dict[str, str]:
    """What is wrong with arguments, by key."""
    with pytest.raises(ConfigError) as raised:
        accelerator_arguments(TrainingArguments(**values), accumulation=1)
    return {problem.key: str(problem) for problem in raised.value.problems}


def test_looking_for_problems_changes_nothing() -> None:
    args = TrainingArguments()
    args.fsdp = "false"
    args.fsdp_config = args.lr_scheduler_kwargs = '{"a": 1}'
    args.include_num_input_tokens_seen = True  # type: ignore[assignment]
    args.bf16 = args.fp16 = True
    before = copy.deepcopy(vars(args))
    found = [problem.key for problem in find_problems(args)]
    assert "bf16" in found
    assert vars(args) == before


def test_a_mapping_in_a_yaml_file_is_read_as_every_file(tmp_path: Path) -> None:
    path = tmp_path / "k.yaml"
    path.write_text("min_lr: 1e-6\nnested:\n  eps: 1e-8\n")
    args = TrainingArguments(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs=str(path))
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6, "nested": {"eps": 1e-8}}
    for text, said in (("- 1\n", "mapping"), ("a: [1\n", "k.yaml:1"), ("a: 1\na: 2\n", "k.yaml:2")):
        path.write_text(text)
        assert said in problems(lr_scheduler_kwargs=str(path))["lr_scheduler_kwargs"]


def test_short_forms_are_read_before_values_are_compared() -> None:
    args = TrainingArguments(fsdp="false", deepspeed={"zero_optimization": {"stage": 2}})
    assert args.fsdp is None
    kwargs = {"use_reentrant": False}
    args = TrainingArguments(
        activation_checkpointing=True,
        activation_checkpointing_kwargs=json.dumps(kwargs),
        gradient_checkpointing_kwargs=kwargs,
        include_num_input_tokens_seen=True,  # type: ignore[arg-type]
    )
    assert args.activation_checkpointing_kwargs == kwargs
    assert args.include_num_input_tokens_seen == "all"


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learnin_rate": 1}, "did you mean learning_rate?"),
        ({"push_to_hub": True}, "paceline uploads nothing"),
        ({"evaluation_strategy": "steps"}, "write eval_strategy"),
        ({"learning_rate": "fast"}, "'fast' is not a number"),
        ({"max_steps": 2.5}, "2.5 is not a whole number"),
        ({"save_strategy": "step"}, "did you mean steps?"),
        ({"optim": "adamw_torsh"}, "did you mean adamw_torch?"),
        ({"lr_scheduler_type": "cosin"}, "did you mean cosine?"),
        ({"bf16": True, "fp16": True}, "a run has one precision"),
        ({"fsdp": True, "deepspeed": {"zero_optimization": {"stage": 2}}}, "both choose the strategy"),
        ({"fsdp": True, "strategy": "ddp"}, "both choose the strategy"),
        ({"global_batch_size": 32, "gradient_accumulation_steps": 2}, "it is derived from global_batch_size"),
        ({"dataloader_prefetch_factor": 2}, "2 with dataloader_num_workers=0"),
        ({"load_best_model_at_end": True}, "nothing decides which checkpoint is best"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 7, "eval_steps": 3},
            "not a multiple",
        ),
        ({"save_strategy": "best"}, "metric_for_best_model"),
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"fsdp": "hybrid_shard"}, "'hybrid_shard' is not supported"),
        ({"fsdp": True, "fsdp_config": {"reshard_after_forwrd": True}}, "did you mean fsdp_reshard_after_forward?"),
        ({"fsdp_config": "no/such/file.json"}, "no such file: no/such/file.json"),
        ({"accelerator_config": {"split_batch": True}}, "did you mean split_batches?"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}}, "0.5 contradicts 1.0"),
        ({"deepspeed": {"zero_optimization": {}, "train_batch_size": 5}}, "5 contradicts 8"),
        ({"deepspeed": "no/such/file.json"}, "there is no file no/such/file.json"),
        ({"enable_jit_checkpoint": True}, "SIGTERM always saves"),
        ({"fsdp": True, "fsdp_config": {"version": 2, "fsdp_version": 1}}, "1, and 2 under its other spelling"),
        ({"logging_steps": 0}, "0 with logging_strategy='steps'"),
        ({"save_steps": 10.5}, "10.5 is not a whole number"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "steps on a metric of the evaluation"),
        ({**PLATEAU, "metric_for_best_model": "accuracy"}, "is missing with lr_scheduler_type='reduce_lr_on_plateau'"),
        (
            {**PLATEAU, "greater_is_better": True, "lr_scheduler_kwargs": {"mode": "min"}},
            "True with mode='min' in lr_scheduler_kwargs",
        ),
        ({"adam_beta2": 1.5}, "at least 0 and below 1"),
        ({"optim_args": "momentum"}, "'momentum' is not key=value"),
        ({"profile_steps": "5:3"}, "'5:3' is not a range of steps"),
        ({"torch_compile_backend": "inductr"}, "torch_compile_backend: the text 'inductr' is not allowed"),
        ({"optim": "grokadamw"}, "give the Trainer optimizer_cls_and_kwargs"),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.03}, "write constant_with_warmup"),
        ({"optim": "schedule_free_sgd", "lr_scheduler_type": "cosine"}, "keeps the peak rate"),
        ({"optim": "schedule_free_radam", "warmup_steps": 5}, "that optimizer needs no warmup"),
        ({"max_tokens": 9, "include_num_input_tokens_seen": "non_padding"}, "max_tokens counts padding"),
        ({"length_column_name": "size"}, "it would be ignored"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "no activations are recomputed"),
        ({"gradient_checkpointing": True, "activation_checkpointing": False}, "they are the same setting"),
        ({"dataloader_multiprocessing_context": "fork"}, "only worker processes use it"),
        ({"parallelism_config": {"dp_shard_sise": 2}}, "parallelism_config.dp_shard_sise: unknown name"),
    ],
    ids=str,
)
def test_what_is_refused(values: dict[str, Any], said: str) -> None:
    assert any(said in text for text in problems(**values).values())


def test_everything_wrong_is_said_at_once() -> None:
    found = problems(learning_rate="x", optim="adm", bf16=True, fp16=True, seed=-1)
    assert set(found) == {"learning_rate", "optim", "bf16", "seed"}
    assert set(problems(evaluation_strategy="steps", learning_rate="x")) == {"evaluation_strategy", "learning_rate"}


def test_yaml_numbers_that_yaml_takes_for_text(tmp_path: Path) -> None:
    file = tmp_path / "arguments.yaml"
    file.write_text("learning_rate: 1e-4\nmax_steps: 1_0\nsave_strategy: no\nbf16: true\n", encoding="utf-8")
    made = TrainingArguments.from_file(file, max_steps=7)
    assert (made.learning_rate, made.max_steps, made.save_strategy, made.bf16) == (1e-4, 7, "no", True)
    file.write_text("learning_rat: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean learning_rate"):
        TrainingArguments.from_file(file)


BAD_YAML = """output_dir: out
learning_rte: 1e-4
max_steps: many
fsdp: true
fsdp_config:
  min_num_param: 3
lr_scheduler_type: cosin
load_best_model_at_end: true
"""


def _read_by_method(file: Path) -> object:
    return TrainingArguments.from_file(file)


def _read_by_parser(file: Path) -> object:
    return TrainingArguments.parse(argv=[str(file)])


@pytest.mark.parametrize("read", [_read_by_method, _read_by_parser])
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_what_is_wrong_in_a_file_is_reported_at_its_line(
    tmp_path: Path, read: Callable[[Path], object], suffix: str
) -> None:
    file = tmp_path / f"run.{suffix}"
    text = BAD_YAML
    if suffix == "json":
        written = json.dumps(yaml.safe_load(BAD_YAML), indent=1).replace("\n }", "}").splitlines()
        text = "\n".join(["{" + written[1], *written[2:]])
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        read(file)
    lines = {problem.key: problem.where for problem in raised.value.problems}
    assert lines == {
        "learning_rte": f"{file}:2",
        "max_steps": f"{file}:3",
        "lr_scheduler_type": f"{file}:7",
        "eval_strategy": f"{file}:8",
    }


@pytest.mark.parametrize("read", [_read_by_method, _read_by_parser])
@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("seed: 1\nseed: 2\n", ":2", "the key is given twice"),
        ("seed: 1\nbf16: [true\n", ":2", "this is not valid YAML"),
        ("- seed\n", ":1", "its top level must be a mapping"),
        ("", ":1", "the file is empty"),
        (None, "", "there is no such file"),
    ],
)
def test_a_file_that_cannot_be_read(
    tmp_path: Path, read: Callable[[Path], object], text: str | None, line: str, what: str
) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        read(file)
    (problem,) = raised.value.problems
    assert problem.where == f"{file}{line}"
    assert what in str(problem)


def test_a_key_inside_a_field_is_reported_at_its_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: {tmp_path}\nfsdp: true\nfsdp_config:\n  min_num_param: 3\n", encoding="utf-8")
    (args,) = TrainingArguments.parse(argv=[str(file)])
    with pytest.raises(ConfigError, match="did you mean") as raised:
        Trainer(torch.nn.Linear(2, 2), args, train_dataset=[])
    assert [problem.where for problem in raised.value.problems] == [f"{file}:4"]


def test_a_flag_that_overrides_the_file_is_named_itself(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim: adamw\nseed: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        TrainingArguments.parse(argv=[str(file), "--optim", "adamw_torsh", "--seed", "-1"])
    assert {problem.where for problem in raised.value.problems} == {"--optim", "--seed"}


def test_numbers_inside_a_field_need_no_decimal_point(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr_scheduler_kwargs:\n  min_lr: 1e-5\n  name: '1e-5'\n", encoding="utf-8")
    assert TrainingArguments.from_file(file).lr_scheduler_kwargs == {"min_lr": 1e-5, "name": "1e-5"}


def test_text_of_a_json_file_keeps_characters_that_json_writes_as_two(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"run_name": "\U0001f680"}), encoding="utf-8")
    assert TrainingArguments.from_file(file).run_name == "\U0001f680"


def test_the_command_line_overrides_its_file(tmp_path: Path) -> None:
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({"learning_rate": 1e-4, "max_steps": 3}), encoding="utf-8")
    line = [str(file), "--max-steps", "9", "--bf16", "--no_dataloader_pin_memory", "--label_names", "a", "b", "--fsdp"]
    made = TrainingArguments.from_command_line(line)
    assert (made.learning_rate, made.max_steps, made.bf16, made.label_names) == (1e-4, 9, True, ["a", "b"])
    assert made.fsdp
    assert not made.dataloader_pin_memory


def test_the_command_line_says_what_was_meant() -> None:
    with pytest.raises(ConfigError) as raised:
        TrainingArguments.from_command_line(["--lerning_rate", "3", "--max_steps", "x"])
    text = str(raised.value)
    assert "did you mean learning_rate?" in text
    assert "--max_steps: 'x' is not a number" in text
    with pytest.raises(ConfigError) as raised:
        TrainingArguments.from_command_line(["--max_steps", "x", "--optim", "adamw_torsh"])
    assert {problem.where for problem in raised.value.problems} == {"--max_steps", "--optim"}
    with pytest.raises(ConfigError) as raised:
        TrainingArguments.from_command_line(
            ["--max_steps", "3", "stray", "--evaluation_strategy", "steps", "--group-by-length"]
        )
    hints = [problem.hint for problem in raised.value.problems]
    assert hints == ["", "write eval_strategy", 'write train_sampling_strategy="group_by_length"']


def test_help_is_grouped_by_what_is_decided(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        TrainingArguments.from_command_line(["--help"])
    text = capsys.readouterr().out
    assert (
        text.index("optimizer, learning rate and loss:") < text.index("--learning_rate") < text.index("data loading:")
    )
    assert "--learning-rate" not in text, "once is enough"


@pytest.mark.parametrize(
    ("said", "means"), [("false", None), ("True", True), (False, None), ("full_shard", "full_shard")]
)
def test_yes_and_no_to_fsdp(said: Any, means: Any) -> None:
    assert TrainingArguments(fsdp=said).fsdp == means


def test_every_field_says_what_it_does() -> None:
    lines = TrainingArguments.describe().splitlines()
    assert len(lines) > 90
    assert not [line for line in lines if not line.endswith(".")]


def with_transformers() -> tuple[Any, ...]:
    from transformers import HfArgumentParser

    line = ["--bf16", "--learning_rate", "3e-4", "--fsdp", "--fsdp_config", '{"version": 2}', "--save_steps", "10"]
    parser = HfArgumentParser(TrainingArguments)  # type: ignore[arg-type]
    (made,) = parser.parse_args_into_dataclasses(line)
    return made.bf16, made.learning_rate, made.fsdp, made.fsdp_config, made.save_steps


def test_the_parser_of_transformers_reads_them() -> None:
    pytest.importorskip("transformers", reason="pip install 'paceline[transformers]'")
    assert run_on_ranks(1, with_transformers) == [(True, 3e-4, True, {"version": 2}, 10)]


def test_what_the_accelerator_is_told() -> None:
    made = TrainingArguments(
        bf16=True,
        ddp_backend="gloo",
        ddp_timeout=60,
        ddp_bucket_cap_mb=5,
        ddp_find_unused_parameters=True,
        ddp_broadcast_buffers=False,
        ddp_static_graph=True,
        torch_compile=True,
        seed=3,
        accelerator_config={
            "split_batches": True,
            "even_batches": False,
            "use_seedable_sampler": False,
            "gradient_accumulation_kwargs": {"sync_each_batch": True},
        },
    )
    said = accelerator_arguments(made, accumulation=4)
    opening, ddp = said["kwargs_handlers"]
    assert (opening.backend, opening.timeout) == ("gloo", timedelta(seconds=60))
    assert (ddp.bucket_cap_mb, ddp.find_unused_parameters, ddp.broadcast_buffers, ddp.static_graph) == (
        5,
        True,
        False,
        True,
    )
    assert (said["mixed_precision"], said["dynamo_plugin"].backend) == ("bf16", "inductor")
    loading, accumulation = said["dataloader_config"], said["gradient_accumulation_plugin"]
    assert (loading.split_batches, loading.even_batches, loading.use_seedable_sampler) == (True, False, False)
    assert loading.data_seed is None, "the order is not seeded"
    seeded = accelerator_arguments(TrainingArguments(seed=3), accumulation=1)["dataloader_config"]
    assert seeded.data_seed == 3
    wrong = TrainingArguments(data_seed=1, accelerator_config={"use_seedable_sampler": False})
    with pytest.raises(ConfigError, match="use_seedable_sampler=False; samplers are not seeded then"):
        accelerator_arguments(wrong, accumulation=1)
    assert (accumulation.num_steps, accumulation.sync_each_batch) == (4, True)
    assert not {"strategy", "cpu", "fsdp_plugin"} & set(said), "what nobody said is left to the launcher"


@pytest.mark.parametrize(
    "config",
    [
        {"reshard_after_forward": False, "transformer_layer_cls_to_wrap": ["Block"]},
        {"fsdp_version": 2, "fsdp_reshard_after_forward": False, "fsdp_transformer_layer_cls_to_wrap": "Block"},
        {"version": 1, "sharding_strategy": "SHARD_GRAD_OP", "transformer_layer_cls_to_wrap": "Block"},
    ],
    ids=["bare", "prefixed", "version 1"],
)
@pytest.mark.parametrize("as_file", [False, True], ids=["mapping", "file"])
def test_both_spellings_of_fsdp_config(config: dict[str, Any], as_file: bool, tmp_path: Path) -> None:
    given: Any = config
    if as_file:
        given = str(tmp_path / "fsdp.json")
        Path(given).write_text(json.dumps(config), encoding="utf-8")
    asked: Any = True
    made = TrainingArguments(fsdp=asked, fsdp_config=given, activation_checkpointing=True)
    plugin = accelerator_arguments(made, accumulation=1)["fsdp_plugin"]
    assert plugin.reshard_after_forward is False
    assert plugin.transformer_cls_names_to_wrap == ("Block",)
    assert plugin.activation_checkpointing


def test_all_that_a_deepspeed_configuration_contradicts_is_said_at_once() -> None:
    described = {
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 0.3,
        "train_batch_size": 99,
        "train_micro_batch_size_per_gpu": 8,
        "bf16": {"enabled": False},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 0.5, "betas": [0.9, 0.999], "eps": "auto", "weight_decay": 0.7},
        },
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 7, "total_num_steps": 10}},
    }
    with pytest.raises(ConfigError) as raised:
        accelerator_arguments(TrainingArguments(deepspeed=described, max_steps=10, bf16=True), accumulation=1)
    assert [problem.key.removeprefix("deepspeed.") for problem in raised.value.problems] == [
        "gradient_clipping",
        "train_batch_size",
        "optimizer.params.lr",
        "optimizer.params.weight_decay",
        "scheduler.params.warmup_num_steps",
        "bf16.enabled",
    ]


def test_the_largest_norm_reaches_a_deepspeed_configuration() -> None:
    made = TrainingArguments(deepspeed={"zero_optimization": {}, "gradient_clipping": "auto"}, max_grad_norm=0.5)
    plugin = accelerator_arguments(made, accumulation=1)["deepspeed_plugin"]
    assert plugin.settings["gradient_clipping"] == 0.5


def test_a_launcher_that_names_another_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = resolve(flags={"use_fsdp": True, "cpu": True}, env={}, file=None)
    monkeypatch.setenv("PACELINE_CONFIG", launched.to_json())
    with pytest.raises(ConfigError) as raised:
        build_accelerator(TrainingArguments(deepspeed={"zero_optimization": {"stage": 2}}), accumulation=1)
    text = str(raised.value)
    assert "TrainingArguments(deepspeed=…)" in text
    assert "--use_fsdp" in text


@pytest.mark.parametrize(
    ("ranks", "most", "expected"),
    [(1, 8, (8, 4)), (2, 8, (8, 2)), (4, 8, (8, 1)), (8, 8, (4, 1)), (4, 3, (2, 4)), (1, 100, (32, 1))],
)
def test_the_global_batch_decides(ranks: int, most: int, expected: tuple[int, int]) -> None:
    made = TrainingArguments(global_batch_size=32, per_device_train_batch_size=most)
    assert made.batch_plan(ranks) == expected


def test_a_global_batch_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="32 cannot be divided among 3 ranks"):
        TrainingArguments(global_batch_size=32).batch_plan(3)


def test_non_blocking_copies_need_pinned_memory() -> None:
    with pytest.warns(UserWarning, match="but dataloader_pin_memory is False"):
        TrainingArguments(accelerator_config={"non_blocking": True}, dataloader_pin_memory=False)
