"""The public names, and the signatures of what they stand for, are Accelerate's."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
from torch import nn

from tests.compat.signatures import EXPORTING, MODULES, described, full_name, recorded

TWIN = "paceline.compat.accelerate"

_MEGATRON = "Megatron-LM is not driven"
_TPU = "TPUs are not supported"
_INNER = "a step of Accelerate's own work, which the core does otherwise"
_COMMAND = "an inner part of Accelerate's parser"

# Names that the twin does not have.
ABSENT = {
    "commands.launch": dict.fromkeys(["CustomHelpFormatter", "clean_option"], _COMMAND),
    "inference": dict.fromkeys(
        ["build_pipeline", "find_pippy_batch_size", "generate_device_map", "pippy_forward"], _INNER
    ),
    "state": {"ThreadLocalSharedDict": _TPU, "do_nothing": _INNER},
    "optimizer": dict.fromkeys(["move_to_device", "patch_optimizer_step"], _INNER),
    "utils.operations": dict.fromkeys(["chained_operation", "verify_operation", "is_torch_xpu_tensor"], _INNER),
}
# Names that stand for something else than in Accelerate.
OTHERWISE = {
    "utils.dataclasses": dict.fromkeys(
        [
            "MegatronLMPlugin",
            "add_model_config_to_megatron_parser",
            "parse_bert_config",
            "parse_glm4_moe_config",
            "parse_gpt2_config",
            "parse_llama_config",
            "parse_t5_config",
        ],
        _MEGATRON,
    ),
}


# Methods ("()" is the constructor) that take more, or whose signature Accelerate's own decorators hide.
DIFFERENT = {
    "accelerator": {"Accelerator": {"init_trackers", "log", "trigger_sync_in_backward"}},
    # The position of a loader is known without a correction for batches read ahead.
    "data_loader": {
        "DataLoaderAdapter": {"adjust_state_dict_for_prefetch"},
        "DataLoaderDispatcher": {"adjust_state_dict_for_prefetch"},
        "DataLoaderShard": {"adjust_state_dict_for_prefetch"},
        "SkipDataLoader": {"adjust_state_dict_for_prefetch"},
        "SeedableRandomSampler": {"()"},
    },
    # The core's optimizer and scheduler have arguments of their own, and know by themselves which step was skipped.
    "optimizer": {"AcceleratedOptimizer": {"()", "step_was_skipped"}},
    "scheduler": {"AcceleratedScheduler": {"()"}},
    "utils.deepspeed": {
        "DeepSpeedOptimizerWrapper": {"()", "step", "step_was_skipped"},
        "DeepSpeedSchedulerWrapper": {"()", "step"},
        "DummyOptim": {"()"},
    },
}


def _load(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a module that moved
        return importlib.import_module(full_name(TWIN, module))


@pytest.mark.parametrize("module", MODULES)
def test_names(module: str) -> None:
    record, loaded = recorded()[module], _load(module)
    missing = {name for name in record if not hasattr(loaded, name)}
    assert missing == set(ABSENT.get(module, {}))


@pytest.mark.parametrize("module", [module for module in MODULES if module not in EXPORTING])
def test_signatures(module: str) -> None:
    record, loaded = recorded()[module], _load(module)
    left_out = {*ABSENT.get(module, {}), *OTHERWISE.get(module, {})}
    different = {}
    for name, expected in record.items():
        if name not in left_out:
            difference = _difference(expected, described(getattr(loaded, name)))
            if difference:
                different[name] = difference
    known = DIFFERENT.get(module, {})
    unknown = {name: found for name, found in different.items() if set(found) != known.get(name)}
    assert unknown == {}
    assert set(different) == set(known)


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Accelerate's and the twin's signatures, where they differ. More methods than Accelerate has are no difference."""
    expected, found = dict(expected), dict(found)
    methods = {**expected.pop("methods", {}), "()": expected.pop("parameters", None)}
    ours = {**found.pop("methods", {}), "()": found.pop("parameters", None)}
    difference = {name: (text, ours.get(name)) for name, text in methods.items() if ours.get(name) != text}
    rest = {key: (value, found.get(key)) for key, value in expected.items() if found.get(key) != value}
    return {**difference, **rest}


@pytest.mark.parametrize("module", [module for module in OTHERWISE if module != "utils.dataclasses"])
def test_what_stands_for_something_else_says_so(module: str) -> None:
    for name in OTHERWISE[module]:
        with pytest.raises(NotImplementedError, match="not"):
            getattr(_load(module), name)(*[None, None][: 2 if name == "PrefixedDataset" else 0])


def test_arguments_that_only_paceline_has_are_refused() -> None:
    from paceline.compat.accelerate.hooks import attach_align_device_hook

    with pytest.raises(TypeError, match="stream"):
        attach_align_device_hook(nn.Linear(2, 2), stream=None)


def test_all_names_of_the_top_can_be_listed() -> None:
    package = importlib.import_module(TWIN)
    assert set(recorded()[""]) <= set(package.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = package.nothing
