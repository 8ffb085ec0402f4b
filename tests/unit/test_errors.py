"""The error tree: drawn as it is, exported whole, and fit to travel between processes."""

from __future__ import annotations

import inspect
import pickle
import re
from typing import TYPE_CHECKING, Any

import pytest

import paceline
from paceline import (
    Accelerator,
    AutocastKwargs,
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    EarlyStoppingCallback,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    Trainer,
    TrainingArguments,
    errors,
)
from paceline.errors import (
    CheckpointError,
    CollectiveError,
    ConfigError,
    DamagedCheckpointError,
    DataError,
    DeviceError,
    ForeignOptimizerError,
    MissingExtraError,
    NotBuiltError,
    OffloadedModelError,
    PacelineError,
    PlacementError,
    PrecisionError,
    PrepareError,
    Problem,
    StateError,
    SteppingError,
    TrackingError,
    UnassignedParametersError,
    UnknownBlockError,
    UnusedParametersError,
    UsageError,
    WorkerError,
    WorldError,
    named,
    named_ranks,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES: list[PacelineError] = [
    PacelineError("This was seen", "That cannot be", "Do something else"),
    ConfigError([Problem("a.yaml:3", "fsdp_config.x", "no such key", hint="did you mean y?")]),
    UsageError("saw", "why", "todo"),
    WorldError("saw", "why", "todo"),
    DeviceError("saw", "why", "todo"),
    PrecisionError("fp16", "a device", ["no", "bf16"]),
    NotBuiltError("x='y'", "Use z"),
    MissingExtraError("deepspeed", "deepspeed", "strategy='deepspeed'"),
    PrepareError("saw", "why", "todo"),
    UnknownBlockError(["Blok"], ["Block", "Linear"]),
    ForeignOptimizerError([(2, 3), (4,)], 5),
    UnassignedParametersError(["a.weight", "b.weight"]),
    UnusedParametersError([f"layer{i}" for i in range(12)]),
    SteppingError("saw", "why", "todo"),
    StateError("saw", "why", "todo"),
    TrackingError("saw", "why", "todo"),
    CheckpointError("saw", "why", "todo"),
    DamagedCheckpointError("saw", "why", "todo"),
    CollectiveError("saw", "why", "todo"),
    DataError("saw", "why", "todo"),
    PlacementError("saw", "why", "todo"),
    OffloadedModelError("saw", "why", "todo"),
    WorkerError("Traceback …", 3),
]


def classes() -> dict[str, type[PacelineError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, PacelineError)
    }


def drawn() -> Iterator[tuple[str, str | None]]:
    """Yield (class, class above it) as the module's docstring draws them."""
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"([│├└─ ]*)([A-Z]\w+Error)\s", line)
        if found is None:
            continue
        depth = len(found[1]) // 4
        above[depth:] = [found[2]]
        yield found[2], above[depth - 1] if depth else None


def test_the_docstring_draws_the_tree_as_it_is() -> None:
    tree = dict(drawn())
    assert len(tree) == len(list(drawn()))
    assert tree == {
        name: cls.__bases__[0].__name__ if cls is not PacelineError else None for name, cls in classes().items()
    }


def test_all_classes_are_exported() -> None:
    assert set(errors.__all__) == {*classes(), "Problem"}
    assert errors.__all__ == sorted(errors.__all__)
    assert paceline.PacelineError is PacelineError


def test_exit_codes_are_those_drawn() -> None:
    codes = {found[1]: int(found[2]) for found in re.finditer(r"(\w+Error)\s+exit code (\d)", errors.__doc__ or "")}
    assert codes["ConfigError"] == codes["UsageError"] == 2
    assert all(classes()[name].exit_code == code for name, code in codes.items())


def test_there_is_an_example_of_each_class() -> None:
    assert {type(error) for error in EXAMPLES} == set(classes().values())


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_travel(error: PacelineError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.args == error.args
    assert vars(back) == vars(error)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_messages_are_sentences(error: PacelineError) -> None:
    text = str(error)
    assert text
    assert not re.search(r"\.\.(?!\.)|\?\.|!\.", text)
    if not isinstance(error, (ConfigError, WorkerError)):
        assert text.endswith(".")


def test_a_message_has_its_three_parts_in_order() -> None:
    error = PacelineError("Saw `x`", "Why is it so?", "Do this.")
    assert str(error) == "Saw `x` Why is it so? Do this."
    assert (error.saw, error.why, error.todo) == ("Saw `x`", "Why is it so?", "Do this.")


def test_a_configuration_error_lists_every_problem() -> None:
    problems = [Problem(f"a.yaml:{n}", f"key{n}", "wrong", "for a reason", "a hint") for n in range(3)]
    lines = str(ConfigError(iter(problems))).splitlines()
    assert lines[0] == "3 problems in the configuration"
    assert lines[1] == "  a.yaml:0: key0: wrong; for a reason; a hint"
    assert len(lines) == 4
    assert str(ConfigError(problems[:1])).startswith("1 problem in the configuration")
    assert str(ConfigError(problems, "nothing was started")).startswith(f"{lines[0]}; nothing was started\n")


@pytest.mark.parametrize(
    ("where", "key", "shown"),
    [
        ("--timeout", "timeout", "--timeout: wrong"),
        ("--zero_stage", "deepspeed_config.zero_stage", "--zero_stage: wrong"),
        ("--nproc_per_node", "num_processes", "--nproc_per_node: num_processes: wrong"),
        ("a.yaml:1", "timeout", "a.yaml:1: timeout: wrong"),
    ],
)
def test_a_key_that_its_flag_names_is_not_repeated(where: str, key: str, shown: str) -> None:
    assert str(Problem(where, key, "wrong")) == shown


def test_a_missing_package_is_an_import_error_too() -> None:
    error = MissingExtraError("tensorboard", "trackers", "log_with='tensorboard'")
    assert isinstance(error, ImportError)
    assert "pip install 'paceline[trackers]'" in str(error)


def test_long_lists_of_names_are_cut() -> None:
    assert named(["a", "b"]) == "a, b"
    assert named([str(n) for n in range(10)], limit=3) == "0, 1, 2 and 7 more"


def test_ranks_are_written_out_in_one_way() -> None:
    assert named_ranks([4, 0, 2, 3]) == "ranks 0, 2-4"
    assert named_ranks([7]) == "rank 7"
    assert named_ranks([7], "is", "are") == "rank 7 is"
    assert named_ranks(range(2), "is", "are") == "ranks 0-1 are"


# Mistyped keywords of constructors


@pytest.mark.parametrize(
    ("make", "wrong", "advice"),
    [
        (Accelerator, {"mixed_precison": "bf16"}, "did you mean mixed_precision?"),
        (Accelerator, {"split_batches": True}, "write dataloader_config=DataLoaderConfiguration(split_batches=…)"),
        (Accelerator, {"fp16": True}, 'write mixed_precision="fp16"'),
        (Accelerator, {"colour": 1}, "the names are device_placement, mixed_precision"),
        (Trainer, {"train_data": []}, "did you mean train_dataset?"),
        (Trainer, {"tokenizer": None}, "write processing_class"),
        (EarlyStoppingCallback, {"patience": 3}, "the names are early_stopping_patience"),
        (TrainingArguments, {"learnin_rate": 1}, "did you mean learning_rate?"),
        (AutocastKwargs, {"enable": True}, "did you mean enabled?"),
        (DataLoaderConfiguration, {"even_batch": True}, "did you mean even_batches?"),
        (DeepSpeedPlugin, {"zerostage": 2}, "did you mean zero_stage?"),
        (DistributedDataParallelKwargs, {"bucket_cap": 3}, "did you mean bucket_cap_mb?"),
        (FullyShardedDataParallelPlugin, {"cpuoffload": True}, "did you mean cpu_offload?"),
        (GradientAccumulationPlugin, {"num_step": 2}, "did you mean num_steps?"),
        (ProjectConfiguration, {"project": "x"}, "did you mean project_dir?"),
    ],
)
def test_a_mistyped_keyword_says_what_was_meant(make: Any, wrong: dict[str, Any], advice: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make(**wrong)
    (problem,) = raised.value.problems
    assert problem.where == f"{make.__name__}(…)"
    assert problem.key in wrong
    assert problem.hint.startswith(advice)


def test_all_mistyped_keywords_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        Accelerator(mixed_precison="bf16", grad_accumulation_steps=2)  # type: ignore[call-arg]
    assert [problem.key for problem in raised.value.problems] == ["mixed_precison", "grad_accumulation_steps"]


def test_the_signature_stays_for_tools_that_read_it() -> None:
    parameters = inspect.signature(Accelerator).parameters
    assert list(parameters)[:3] == ["device_placement", "mixed_precision", "gradient_accumulation_steps"]
    assert "train_dataset" in inspect.signature(Trainer).parameters


def test_a_type_error_inside_a_constructor_is_not_taken_for_a_keyword() -> None:
    with pytest.raises(TypeError, match="positional"):
        Accelerator(True, "bf16")  # type: ignore[call-arg]


def test_a_choice_of_files_only_is_not_offered_to_python() -> None:
    with pytest.raises(ConfigError, match="it must be 2"):
        FullyShardedDataParallelPlugin(fsdp_version=1)  # type: ignore[arg-type]


def test_a_sentence_after_a_list_of_lines_begins_its_own_line() -> None:
    assert str(PacelineError("They differ:\n  a\n  b\n", "Nothing works", "Fix it")) == (
        "They differ:\n  a\n  b\nNothing works. Fix it."
    )


def test_a_model_without_modules_has_no_list_of_classes() -> None:
    text = str(UnknownBlockError(["LlamaDecoderLayer"], [], source="run.yaml:3: fsdp_transformer_layer_cls_to_wrap"))
    assert text.endswith("The model contains no modules: remove the setting, and it is one sharding unit.")
