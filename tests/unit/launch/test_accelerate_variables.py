"""The variables of Accelerate's own clients: what its plugins read from them, and what none of them carries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paceline.config import resolve
from paceline.errors import ConfigError
from paceline.launch import Command, plan
from paceline.launch.accelerate_variables import Target, accelerate_variables, not_carried
from paceline.launch.script_imports import trains_with_accelerate
from tests.unit.config.files import FOUNDING

ON_GPUS = Target("1.15.0", has_device=True, world_size=4)
ON_CPUS = Target("1.15.0", has_device=False, world_size=2)
FSDP = "distributed_type: FSDP\nnum_processes: 4\nfsdp_config:\n"
DEEPSPEED = "distributed_type: DEEPSPEED\nnum_processes: 4\ndeepspeed_config:\n"

# Builds Accelerate's own objects from each environment and prints the fields that were asked for.
READER = """
import json, os, sys, warnings
warnings.filterwarnings("ignore")
import accelerate.utils as utils
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState

def simple(value):
    if isinstance(value, (str, int, float, bool, list, dict, type(None))):
        return value
    return getattr(value, "__name__", None) or getattr(value, "name", None) or type(value).__name__

answers = []
before = dict(os.environ)
for name, fields, variables in json.load(sys.stdin):
    os.environ.clear()
    os.environ.update(before, **variables)
    if name == "Accelerator":
        from accelerate import Accelerator
        AcceleratorState._reset_state(True)
        made = Accelerator()
    else:
        made = ParallelismConfig() if name == "ParallelismConfig" else getattr(utils, name)()
    answers.append({field: simple(getattr(made, field)) for field in fields})
print(json.dumps(answers))
"""

FSDP_DEFAULTS = {
    "fsdp_version": 2,
    "reshard_after_forward": True,
    "cpu_offload": "OffloadPolicy",
    "auto_wrap_policy": "transformer_auto_wrap_policy",
    "transformer_cls_names_to_wrap": None,
    "state_dict_type": "SHARDED_STATE_DICT",
    "cpu_ram_efficient_loading": True,
    "activation_checkpointing": False,
    "activation_checkpointing_offload": False,
    "ignored_modules": None,
}
ZERO_DEFAULTS = {
    "zero_stage": 2,
    "offload_optimizer_device": "none",
    "offload_param_device": "none",
    "offload_optimizer_nvme_path": "none",
    "offload_param_nvme_path": "none",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero3_init_flag": False,
    "zero3_save_16bit_model": False,
}
PLUGIN = "FullyShardedDataParallelPlugin"
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "founding file": (FOUNDING, PLUGIN, {**FSDP_DEFAULTS, "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}),
    "fsdp without a section": ("strategy: fsdp\nnum_processes: 4\n", PLUGIN, FSDP_DEFAULTS),
    "fsdp kept": (
        FSDP + "  fsdp_reshard_after_forward: false\n  fsdp_state_dict_type: FULL_STATE_DICT\n"
        "  fsdp_cpu_ram_efficient_loading: false\n  fsdp_ignored_modules: .*router\n",
        PLUGIN,
        {
            **FSDP_DEFAULTS,
            "reshard_after_forward": False,
            "state_dict_type": "FULL_STATE_DICT",
            "cpu_ram_efficient_loading": False,
            "ignored_modules": ".*router",
        },
    ),
    "fsdp offloaded": (
        FSDP + "  fsdp_offload_params: true\n  fsdp_activation_checkpointing: true\n"
        "  fsdp_activation_checkpointing_offload: true\n",
        PLUGIN,
        {
            **FSDP_DEFAULTS,
            "cpu_offload": "CPUOffloadPolicy",
            "activation_checkpointing": True,
            "activation_checkpointing_offload": True,
        },
    ),
    "fsdp by size": (
        FSDP + "  fsdp_auto_wrap_policy: SIZE_BASED_WRAP\n  fsdp_min_num_params: 5000\n",
        PLUGIN,
        {**FSDP_DEFAULTS, "auto_wrap_policy": "size_based_auto_wrap_policy", "min_num_params": 5000},
    ),
    "fsdp in one unit": (
        FSDP + "  fsdp_auto_wrap_policy: NO_WRAP\n",
        PLUGIN,
        {**FSDP_DEFAULTS, "auto_wrap_policy": None},
    ),
    "fsdp of version 1": (
        FSDP + "  fsdp_version: 1\n  fsdp_sharding_strategy: SHARD_GRAD_OP\n",
        PLUGIN,
        {**FSDP_DEFAULTS, "reshard_after_forward": False},
    ),
    "two copies": (
        FSDP + "  fsdp_version: 2\nparallelism_config:\n  parallelism_config_dp_replicate_size: 2\n",
        "ParallelismConfig",
        {"dp_replicate_size": 2, "dp_shard_size": 2, "tp_size": 1},
    ),
    "zero 2": (DEEPSPEED + "  zero_stage: 2\n", "DeepSpeedPlugin", ZERO_DEFAULTS),
    "zero 3": (
        DEEPSPEED + "  zero_stage: 3\n  offload_param_device: cpu\n  offload_optimizer_device: nvme\n"
        "  offload_optimizer_nvme_path: /fast\n  gradient_clipping: 0.5\n  gradient_accumulation_steps: 3\n"
        "  zero3_save_16bit_model: true\n",
        "DeepSpeedPlugin",
        {
            **ZERO_DEFAULTS,
            "zero_stage": 3,
            "offload_param_device": "cpu",
            "offload_optimizer_device": "nvme",
            "offload_optimizer_nvme_path": "/fast",
            "gradient_clipping": 0.5,
            "gradient_accumulation_steps": 3,
            "zero3_init_flag": True,
            "zero3_save_16bit_model": True,
        },
    ),
    "DeepSpeed's own file": (
        DEEPSPEED + "  deepspeed_config_file: zero.json\n  zero3_init_flag: false\n",
        "DeepSpeedPlugin",
        {
            **ZERO_DEFAULTS,
            "zero_stage": 3,
            "gradient_clipping": 2.0,
            "offload_optimizer_device": "cpu",
            "offload_param_device": "none",
        },
    ),
    "plain values": (
        "num_processes: 1\nmixed_precision: bf16\ngradient_accumulation_steps: 4\ndebug: true\nuse_cpu: true\n",
        "Accelerator",
        {"mixed_precision": "bf16", "gradient_accumulation_steps": 4, "num_processes": 1},
    ),
    "compiled": (
        "num_processes: 1\ndynamo_config:\n  dynamo_backend: inductor\n  dynamo_mode: max-autotune\n"
        "  dynamo_use_fullgraph: true\n  dynamo_use_dynamic: true\n  dynamo_use_regional_compilation: true\n",
        "TorchDynamoPlugin",
        {
            "backend": "INDUCTOR",
            "mode": "max-autotune",
            "fullgraph": True,
            "dynamic": True,
            "use_regional_compilation": True,
        },
    ),
    "compiled for shapes as they come": (
        "num_processes: 1\ndynamo_config:\n  dynamo_backend: eager\n",
        "TorchDynamoPlugin",
        {"backend": "EAGER", "mode": "default", "fullgraph": False, "dynamic": None},
    ),
}
ZERO_FILE = {
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    "gradient_clipping": 2.0,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def variables_of(text: str, target: Target, folder: Path, env: dict[str, str] | None = None) -> dict[str, str]:
    (folder / "zero.json").write_text(json.dumps(ZERO_FILE))
    (folder / "run.yaml").write_text(text)
    return accelerate_variables(resolve(flags={}, env={}, file=folder / "run.yaml"), target, env or {})


@pytest.fixture(scope="module")
def read_by_accelerate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What Accelerate's own objects hold for each case, all built in one process."""
    pytest.importorskip("accelerate", reason="pip install accelerate")
    folder = tmp_path_factory.mktemp("cases")
    asked = [(kind, list(fields), variables_of(text, ON_GPUS, folder)) for text, kind, fields in CASES.values()]
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_accelerate_reads_what_the_file_says(case: str, read_by_accelerate: dict[str, dict[str, Any]]) -> None:
    assert read_by_accelerate[case] == CASES[case][2]


def test_the_switches_of_each_strategy(tmp_path: Path) -> None:
    switches = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_CPU"}
    for text, target, on in (
        (FOUNDING, ON_GPUS, {"ACCELERATE_USE_FSDP"}),
        (FOUNDING, ON_CPUS, {"ACCELERATE_USE_CPU"}),
        (FOUNDING + "as_accelerate: true\n", ON_CPUS, {"ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP"}),
        (DEEPSPEED + "  zero_stage: 2\n", ON_GPUS, {"ACCELERATE_USE_DEEPSPEED"}),
        (DEEPSPEED + "  zero_stage: 2\n", ON_CPUS, {"ACCELERATE_USE_DEEPSPEED"}),
        ("strategy: ddp\nnum_processes: 2\n", ON_GPUS, set()),
        ("strategy: ddp\nnum_processes: 2\n", ON_CPUS, {"ACCELERATE_USE_CPU"}),
        ("num_processes: 1\n", Target("1.15.0", has_device=False, world_size=1), set()),
    ):
        variables = variables_of(text, target, tmp_path)
        assert {name for name in switches if variables.get(name) == "true"} == on, text


def test_without_accelerate_there_are_no_variables_unless_paceline_takes_its_place(tmp_path: Path) -> None:
    absent = Target(None, has_device=True, world_size=4)
    assert variables_of(FOUNDING, absent, tmp_path) == {}
    assert "ACCELERATE_USE_FSDP" in variables_of(FOUNDING + "as_accelerate: true\n", absent, tmp_path)


def test_what_the_shell_turned_on_and_the_configuration_does_not_is_turned_off(tmp_path: Path) -> None:
    shell = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_LOG_LEVEL": "INFO"}
    variables = variables_of("strategy: ddp\nnum_processes: 4\n", ON_GPUS, tmp_path, shell)
    assert variables == {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_MIXED_PRECISION": "no"}


PROBLEMS = {
    "timeout": ("num_processes: 2\ntimeout: 60\n", ON_GPUS, ["timeout"]),
    "a strategy that is chosen later": ("num_processes: 2\nstrategy: auto\n", ON_GPUS, ["strategy"]),
    "DDP's settings": (
        "num_processes: 2\nstrategy: ddp\nddp_config:\n  ddp_bucket_cap_mb: 50\n  ddp_static_graph: true\n",
        ON_GPUS,
        ["ddp_config.ddp_bucket_cap_mb", "ddp_config.ddp_static_graph"],
    ),
    "a number of ranks to reshard over": (
        FSDP + "  fsdp_reshard_after_forward: 2\n",
        ON_GPUS,
        ["fsdp_config.fsdp_reshard_after_forward"],
    ),
    "a dtype": (FSDP + "  fsdp_reduce_dtype: fp32\n", ON_GPUS, ["fsdp_config.fsdp_reduce_dtype"]),
    "options of the compiler": (
        "num_processes: 1\ndynamo_config:\n  dynamo_backend: inductor\n  dynamo_options: {epilogue_fusion: true}\n",
        ON_GPUS,
        ["dynamo_config.dynamo_options"],
    ),
    "DeepSpeed without a device": (DEEPSPEED + "  zero_stage: 2\n", ON_CPUS, ["strategy"]),
    "an Accelerate without FSDP2": (FOUNDING, Target("1.4.0", has_device=True, world_size=4), ["strategy"]),
    "nothing": (FOUNDING, ON_GPUS, []),
    "paceline in its place": (DEEPSPEED + "  zero_stage: 2\nas_accelerate: true\ntimeout: 3\n", ON_CPUS, []),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_no_variable_carries_is_a_problem(case: str, tmp_path: Path) -> None:
    text, target, keys = PROBLEMS[case]
    (tmp_path / "run.yaml").write_text(text)
    problems = not_carried(resolve(flags={}, env={}, file=tmp_path / "run.yaml"), target)
    assert [problem.key for problem in problems] == keys
    for problem in problems:
        assert f"{tmp_path}/run.yaml:" in problem.where
        assert "does not reach a script that uses Accelerate's own Accelerator" in problem.what
        assert problem.why
        assert "--as_accelerate" in problem.hint


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from accelerate import Accelerator\n", True),
        ("import accelerate\na = accelerate.Accelerator()\n", True),
        ("from transformers import Trainer, TrainingArguments\n", True),
        ("from transformers import Seq2SeqTrainer as T\n", True),
        ("import transformers\ntransformers.Trainer\n", True),
        ("def main():\n    from trl import SFTTrainer\n", True),
        ("from transformers import AutoModel\nfrom accelerate.utils import set_seed\n", False),
        ("from paceline import Accelerator\nfrom transformers import Trainer\n", False),
        ("from .transformers import Trainer\n", False),
        ("this is not Python\n", False),
        ("", False),
    ],
)
def test_a_script_that_shows_what_it_trains_with(source: str, expected: bool, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(source)
    assert trains_with_accelerate(Command(str(script))) is expected
    assert not trains_with_accelerate(Command(str(script), kind="program"))
    assert not trains_with_accelerate(Command(str(tmp_path)))


def test_the_plan_holds_the_variables_and_paceline_reads_none_of_them(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="pip install accelerate")
    (tmp_path / "script.py").write_text("")
    settings = resolve(flags={"mixed_precision": "bf16", "num_processes": 2, "cpu": True}, env={}, file=None)
    variables = plan(settings, Command(str(tmp_path / "script.py")), {}).variables
    assert variables["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert variables["ACCELERATE_USE_CPU"] == "true"
    code = "import paceline; a = paceline.Accelerator(); print(a.mixed_precision, a.device)"
    shell = {"ACCELERATE_MIXED_PRECISION": "fp16", "FSDP_VERSION": "1", "ACCELERATE_USE_FSDP": "true"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **shell, "PACELINE_CONFIG": settings.to_json()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["bf16", "cpu"], done.stderr


def test_the_launcher_refuses_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("from transformers import Trainer\nprint('started')\n")
    command = [sys.executable, "-m", "paceline", "launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*command, "--timeout", "60", "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == ConfigError.exit_code
    assert "started" not in done.stdout
    assert "--timeout: 60" in done.stderr


def test_how_torchao_computes_in_fp8(tmp_path: Path) -> None:
    text = "mixed_precision: fp8\nfp8_config:\n  backend: AO\n  pad_inner_dim: false\n"
    variables = variables_of(text, ON_GPUS, tmp_path)
    assert variables["ACCELERATE_FP8_BACKEND"] == "AO"
    assert variables["ACCELERATE_FP8_PAD_INNER_DIM"] == "false"
