"""DeepSpeed's own JSON: where it may come from, its names, and what it shares with the run's configuration."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest

from paceline.config.deepspeed_file.keys import REMOVED, REMOVED_FROM_ZERO, SECTIONS
from paceline.config.deepspeed_file.settings import Shared, name_problems, read_settings, shared_values, value_at, walk
from tests.unit.config.files import problems, read

if TYPE_CHECKING:
    from pathlib import Path

ZERO: dict[str, Any] = {"zero_optimization": {"stage": 2}}
TEXT = json.dumps(ZERO)


@pytest.mark.parametrize("kind", ["dict", "path", "name beside the file", "text", "base64"])
def test_it_is_read_from(tmp_path: Path, kind: str) -> None:
    (tmp_path / "ds.json").write_text(TEXT)
    value: Any = {
        "dict": ZERO,
        "path": str(tmp_path / "ds.json"),
        "name beside the file": "ds.json",
        "text": f"  {TEXT}",
        "base64": base64.b64encode(TEXT.encode()).decode(),
    }[kind]
    settings, name, wrong = read_settings(value, tmp_path)
    assert (settings, wrong) == (ZERO, "")
    assert name
    if kind == "dict":
        assert settings is not value, "the user's dictionary is left alone"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("nowhere.json", "there is no file nowhere.json"),
        (
            "bad.json",
            "bad.json:2 is not valid JSON: Expecting property name enclosed in double quotes at column 3, in `",
        ),
        ("list.json", "holds a list, not a JSON object"),
        ("{", "the JSON text:1 is not valid JSON"),
        ("binary.json", "cannot be read"),
        ("twice.json", "twice.json has the key 'stage' twice in one object"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, value: str, said: str) -> None:
    (tmp_path / "bad.json").write_text("{\n  'stage': 1}")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "twice.json").write_text('{"zero_optimization": {"stage": 2, "stage": 3}}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    settings, _, wrong = read_settings(value, tmp_path)
    assert settings is None
    assert said in wrong


@pytest.mark.parametrize(
    ("extra", "key", "said"),
    [
        ({"zero_optimisation": {}}, "zero_optimisation", "did you mean zero_optimization?"),
        ({"zero_optimization": {"stgae": 1}}, "zero_optimization.stgae", "did you mean stage?"),
        (
            {"zero_optimization": {"stage": 1, "offload_param": {"devise": "cpu"}}},
            "zero_optimization.offload_param.devise",
            "did you mean device?",
        ),
        ({"fp16": {"enabeld": True}}, "fp16.enabeld", "did you mean enabled?"),
        ({"optimizer": {"typ": "Adam"}}, "optimizer.typ", "did you mean type?"),
        ({"fp16": True}, "fp16", "True is not allowed"),
        ({"amp": {"enabled": True}}, "amp", "is not supported"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16.enabled", "they exclude each other"),
        ({"zero_optimization": None}, "zero_optimization", "the section is missing"),
        ({"bfloat16": {"enabled": True}}, "bfloat16", "write bf16"),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            "zero_optimization.cpu_offload",
            "offload_optimizer",
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_gather_fp16_weights_on_model_save": True}},
            "zero_optimization.stage3_gather_fp16_weights_on_model_save",
            "write zero_optimization.stage3_gather_16bit_weights_on_model_save",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": "auto"}},
            "zero_optimization.offload_optimizer",
            "'auto' is not allowed",
        ),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled", "'true' is not allowed"),
        ({"train_micro_batch_size_per_gpu": "4"}, "train_micro_batch_size_per_gpu", "a whole number of at least 1"),
        ({"train_batch_size": 0}, "train_batch_size", "0 is not allowed"),
        ({"communication_data_type": "fp8"}, "communication_data_type", "one of fp32, fp16, bf16"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last", "write DataLoader(drop_last=True)"),
        ({"aio": {"blok_size": 1}}, "aio.blok_size", "did you mean block_size?"),
        ({"comms_logger": {"enabeld": True}}, "comms_logger.enabeld", "did you mean enabled?"),
    ],
    ids=str,
)
def test_wrong_names_are_found(extra: dict[str, Any], key: str, said: str) -> None:
    [found] = name_problems(ZERO | extra, "ds.json")
    assert (found.where, found.key) == ("ds.json", key)
    assert said in str(found)


@pytest.mark.parametrize(
    "extra", [{"amp": {"enabled": False}}, {"sequence_parallel_size": 1}, {"scheduler": None}], ids=str
)
def test_what_asks_for_nothing_is_let_be(extra: dict[str, Any]) -> None:
    assert not list(name_problems(ZERO | extra, "ds.json"))


# One that asks for something, of every block that DeepSpeed documents or documented.
NOT_CARRIED_OUT: dict[str, Any] = {
    "amp": {"enabled": True, "opt_level": "O1"},
    "autotuning": {"enabled": True, "fast": True},
    "checkpoint": {"tag_validation": "Warn", "parallel_write": {"pipeline_stage": True}},
    "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}},
    "curriculum_learning": {"enabled": True, "curriculum_type": "seqlen"},
    "data_efficiency": {"enabled": True, "seed": 1234},
    "datastates_ckpt": {"host_cache_size": 16},
    "eigenvalue": {"enabled": True, "verbose": True},
    "elasticity": {"enabled": True, "max_train_batch_size": 2000},
    "expert_parallel": {"enabled": True},
    "fp32_allreduce": True,
    "graph_harvesting": True,
    "hybrid_engine": {"enabled": True, "max_out_tokens": 512},
    "nebula": {"enabled": True},
    "pipeline": {"stages": 2},
    "progressive_layer_drop": {"enabled": True, "theta": 0.5},
    "quantize_training": {"enabled": True},
    "sequence_parallel_size": 2,
    "sparse_attention": {"mode": "fixed", "block": 16},
    "sparse_gradients": True,
    "tensor_parallel": {"autotp_size": 2},
    "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    "weight_quantization": {"quantize": True},
}


@pytest.mark.parametrize("key", NOT_CARRIED_OUT)
def test_a_block_that_is_not_carried_out_says_why_and_what_to_do(key: str) -> None:
    [found] = name_problems(ZERO | {key: NOT_CARRIED_OUT[key]}, "ds.json")
    assert (found.key, found.what, found.hint) == (key, "is not supported", "remove the key")
    assert len(found.why) > 10


@pytest.mark.parametrize(
    ("extra", "key", "place"),
    [
        ({"optimizer": {"type": "AdamW", "torch_adam": True}}, "optimizer.torch_adam", "optimizer.params"),
        ({"optimizer": {"type": "AdamW", "lr": 0.1}}, "optimizer.lr", "optimizer.params"),
        ({"scheduler": {"type": "WarmupLR", "warmup_num_steps": 3}}, "scheduler.warmup_num_steps", "scheduler.params"),
        ({"stage": 2}, "stage", "zero_optimization"),
        ({"offload_optimizer": {"device": "cpu"}}, "offload_optimizer", "zero_optimization"),
        ({"loss_scale": 0}, "loss_scale", "fp16"),
        ({"partition_activations": True}, "partition_activations", "activation_checkpointing"),
        ({"grad_accum_dtype": "fp32"}, "grad_accum_dtype", "data_types"),
        (
            {"zero_optimization": {"stage": 2, "gradient_clipping": 1.0}},
            "zero_optimization.gradient_clipping",
            "the top level",
        ),
    ],
    ids=str,
)
def test_a_key_at_the_wrong_level_is_told_its_place(extra: dict[str, Any], key: str, place: str) -> None:
    [found] = name_problems(ZERO | extra, "ds.json")
    assert (found.key, found.what) == (key, "is not read here")
    assert found.why.startswith("it is read ")
    assert found.why.endswith(place)


def test_every_name_that_deepspeed_reads_is_known() -> None:
    """A release of DeepSpeed with further keys shows here first."""
    pytest.importorskip("deepspeed", reason="pip install 'paceline[deepspeed]'")
    from deepspeed.monitor import config as monitors
    from deepspeed.runtime import config, precision_config
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config

    sections = {
        "zero_optimization": zero.DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": offload_config.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": offload_config.DeepSpeedZeroOffloadParamConfig,
        "fp16": precision_config.DeepSpeedFP16Config,
        "bf16": precision_config.DeepSpeedBF16Config,
        "tensorboard": monitors.TensorBoardConfig,
        "csv_monitor": monitors.CSVConfig,
        "wandb": monitors.WandbConfig,
        "comet": monitors.CometConfig,
    }
    for name, model in sections.items():
        read = {info.alias or field for field, info in model.model_fields.items()}
        assert read <= SECTIONS[name] | REMOVED_FROM_ZERO, name
    assert set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(REMOVED)


def test_all_wrong_names_are_found_at_once() -> None:
    found = list(name_problems({"a": 1, "zero_optimization": {"b": 2}, "amp": {"enabled": True}}, "ds.json"))
    assert [problem.key for problem in found] == ["a", "amp", "zero_optimization.b"]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (ZERO, [("zero_optimization.stage", "deepspeed_config.zero_stage", 2)]),
        ({"zero_optimization": {"stage": "auto"}}, []),
        ({"gradient_accumulation_steps": 4}, [("gradient_accumulation_steps", "gradient_accumulation_steps", 4)]),
        ({"gradient_clipping": 1}, [("gradient_clipping", "deepspeed_config.gradient_clipping", 1.0)]),
        ({"gradient_clipping": "auto"}, []),
        ({"bf16": {"enabled": True}}, [("bf16.enabled", "mixed_precision", "bf16")]),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, [("fp16.enabled", "mixed_precision", "fp16")]),
        ({"fp16": {"enabled": False}, "bf16": {"enabled": False}}, [("bf16.enabled", "mixed_precision", "no")]),
        ({"fp16": {"enabled": "auto"}}, []),
    ],
    ids=str,
)
def test_values_that_the_run_owns(settings: dict[str, Any], wanted: list[tuple[str, str, Any]]) -> None:
    assert list(shared_values(settings)) == [Shared(*one) for one in wanted]


def test_keys_of_stages_and_devices_out_of_use_are_not_shared() -> None:
    zero: dict[str, Any] = {"stage": 2, "stage3_gather_16bit_weights_on_model_save": True}
    zero["offload_optimizer"] = {"device": "cpu", "nvme_path": "/disk"}
    shared = {one.key.rpartition(".")[2]: one.value for one in shared_values({"zero_optimization": zero})}
    assert shared == {"zero_stage": 2, "offload_optimizer_device": "cpu"}


def test_paths() -> None:
    assert value_at({"a": {"b": 1}}, "a.b") == 1
    assert value_at({"a": 3}, "a.b") is None
    assert dict(walk({"a": {"b": 1, "c": {}}, "d": "auto"})) == {"a.b": 1, "a.c": {}, "d": "auto"}


# Through the whole configuration

FILE = "distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: ds.json\n"


def test_what_only_the_json_says_becomes_the_runs(tmp_path: Path) -> None:
    described = {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "nvme", "nvme_path": "/disk"},
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
    }
    (tmp_path / "ds.json").write_text(json.dumps(described))
    resolved = read(tmp_path, FILE)
    config, plugin = resolved.config, resolved.config.deepspeed_config
    assert plugin is not None
    assert (config.gradient_accumulation_steps, config.mixed_precision) == (4, "bf16")
    assert (plugin.zero_stage, plugin.gradient_clipping, plugin.zero3_save_16bit_model) == (3, 0.5, True)
    assert (plugin.offload_optimizer_device, plugin.offload_optimizer_nvme_path) == ("nvme", "/disk")
    assert plugin.settings == described
    assert "ds.json: zero_optimization.stage" in resolved.origin("deepspeed_config.zero_stage").where


def test_every_clash_is_named_with_both_sources(tmp_path: Path) -> None:
    described = {"zero_optimization": {"stage": 3}, "gradient_clipping": 0.5, "bf16": {"enabled": True}}
    (tmp_path / "ds.json").write_text(json.dumps(described))
    text = f"{FILE}  zero_stage: 2\n  gradient_clipping: 1.0\nmixed_precision: fp16\n"
    found = problems(tmp_path, text)
    assert [(problem.where, problem.key.rpartition(".")[2]) for problem in found] == [
        ("config.yaml:5", "gradient_clipping"),
        ("config.yaml:4", "zero_stage"),
        ("config.yaml:6", "mixed_precision"),
    ]
    assert all("ds.json: " in problem.what for problem in found)


@pytest.mark.parametrize(
    ("zero", "key", "said"),
    [
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param.device", "only stage 3 shards parameters"),
        (
            {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}},
            "offload_optimizer.device",
            "only stage 3 keeps optimizer state on a disk",
        ),
    ],
    ids=str,
)
def test_a_device_that_the_stage_does_not_use(tmp_path: Path, zero: dict[str, Any], key: str, said: str) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    [found] = problems(tmp_path, FILE)
    assert found.where == f"ds.json: zero_optimization.{key}"
    assert said in str(found)


@pytest.mark.parametrize("value", ["abc", "1.0", -1, True])
def test_a_largest_norm_that_is_no_number(tmp_path: Path, value: object) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(ZERO | {"gradient_clipping": value}))
    [found] = problems(tmp_path, FILE)
    assert found.where == "ds.json: gradient_clipping"


def test_what_both_say_alike_is_no_clash(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    config = read(tmp_path, f"{FILE}  zero_stage: 3\n").config
    assert config.deepspeed_config is not None
    assert config.deepspeed_config.zero_stage == 3


def test_paths_on_nvme_reach_the_engines_dictionary(tmp_path: Path) -> None:
    text = (
        "distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 3\n"
        "  offload_optimizer_device: nvme\n  offload_optimizer_nvme_path: /one\n"
        "  offload_param_device: nvme\n  offload_param_nvme_path: /two\n"
    )
    plugin = read(tmp_path, text).config.deepspeed_config
    assert plugin is not None
    assert plugin.zero_section() == {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/one"},
        "offload_param": {"device": "nvme", "nvme_path": "/two"},
    }
