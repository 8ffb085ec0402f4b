"""The configuration file as an object, with Accelerate's classes and keys."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml

from paceline.compat.accelerate.settings.enums import ComputeEnvironment, DistributedType, SageMakerDistributedType
from paceline.compat.accelerate.settings.errors import InvalidValueError
from paceline.compat.accelerate.utils.constants import (
    SAGEMAKER_PYTHON_VERSION,
    SAGEMAKER_PYTORCH_VERSION,
    SAGEMAKER_TRANSFORMERS_VERSION,
)
from paceline.config.schema.names import sections, settings_by_key
from paceline.config.sources import locate
from paceline.errors import did_you_mean

__all__ = [
    "BaseConfig",
    "ClusterConfig",
    "SageMakerConfig",
    "cache_dir",
    "default_config_file",
    "default_json_config_file",
    "default_yaml_config_file",
    "load_config_from_file",
]

default_config_file = str(locate.find_config_file(os.environ) or locate.default_config_file(os.environ))
"""The file that a launch reads without `--config_file`; it may not exist."""
default_json_config_file = default_config_file
default_yaml_config_file = default_config_file
cache_dir = str(Path(default_config_file).parent)

_C = TypeVar("_C", bound="BaseConfig")
_TYPE_OF_STRATEGY: Final = {"single": "NO", "ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed": "DEEPSPEED"}


def load_config_from_file(config_file: str | os.PathLike[str] | None) -> ClusterConfig | SageMakerConfig:
    """Read a file in YAML or JSON.

    Args:
        config_file: The file; None reads the default one.

    Returns:
        The configuration of a cluster, or of a job on SageMaker.

    Raises:
        FileNotFoundError: There is no such file.
        InvalidValueError: It has unknown keys, or lacks `distributed_type`.
    """
    file = default_config_file if config_file is None else os.fspath(config_file)
    if config_file is not None and not os.path.isfile(file):  # noqa: PTH113 - tests of programs replace Path.exists
        raise FileNotFoundError(
            f"There is no file {file!r}. It was named as the configuration file. Check the path, or leave it out: "
            "then the file that `paceline config` wrote is read."
        )
    values = _read(file)
    is_local = values.get("compute_environment", "LOCAL_MACHINE") == ComputeEnvironment.LOCAL_MACHINE
    kind: type[ClusterConfig] | type[SageMakerConfig] = ClusterConfig if is_local else SageMakerConfig
    return kind.from_values(values, file)


def _read(file: str | os.PathLike[str]) -> dict[str, Any]:
    text = Path(file).read_text(encoding="utf-8")
    values = json.loads(text) if str(file).endswith(".json") else yaml.safe_load(text)
    return dict(values or {})


def _plain(value: Any) -> Any:
    """A value for a file: no enumerations, and None for an empty section."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()} or None
    return value


@dataclass
class BaseConfig:
    """What every configuration has.

    Keys that only paceline has become attributes, too.
    """

    compute_environment: ComputeEnvironment
    distributed_type: DistributedType | SageMakerDistributedType
    mixed_precision: str | None
    use_cpu: bool
    debug: bool

    def __post_init__(self) -> None:
        """Turn names into members of the enumerations."""
        self.compute_environment = ComputeEnvironment(self.compute_environment)
        is_sagemaker = self.compute_environment == ComputeEnvironment.AMAZON_SAGEMAKER
        kind: type[DistributedType] | type[SageMakerDistributedType] = DistributedType
        if is_sagemaker:
            kind = SageMakerDistributedType
        self.distributed_type = kind(self.distributed_type)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by key, without those that are None or empty."""
        values = {key: _plain(value) for key, value in vars(self).items()}
        return {key: value for key, value in values.items() if value is not None}

    @staticmethod
    def process_config(config_dict: dict[str, Any]) -> dict[str, Any]:
        """Write old keys as they are written now, and fill in what a file may leave out.

        Args:
            config_dict: The keys of a file; changed in place.

        Returns:
            The same dictionary.

        Raises:
            InvalidValueError: There is no `distributed_type`.
        """
        for key in ("distributed_type", "mixed_precision"):
            if config_dict.get(key) is False:  # what YAML makes of an unquoted NO
                config_dict[key] = "NO" if key == "distributed_type" else "no"
        strategy = config_dict.get("strategy")
        if strategy in _TYPE_OF_STRATEGY:
            config_dict.setdefault("distributed_type", _TYPE_OF_STRATEGY[strategy])
        if "distributed_type" not in config_dict:
            raise InvalidValueError(
                "There is no `distributed_type` in the configuration",
                "A file of Accelerate says how the run is distributed",
                "Add one, for example `distributed_type: MULTI_GPU`, or read the file with paceline itself",
            )
        if config_dict["distributed_type"] == DistributedType.NO:
            config_dict.setdefault("num_processes", 1)
        is_half = config_dict.pop("fp16", False)
        config_dict.setdefault("mixed_precision", "fp16" if is_half else None)
        if "dynamo_backend" in config_dict:
            backend = config_dict.pop("dynamo_backend")
            config_dict["dynamo_config"] = {} if backend == "NO" else {"dynamo_backend": backend}
        config_dict.setdefault("compute_environment", ComputeEnvironment.LOCAL_MACHINE)
        for key in ("use_cpu", "debug", "enable_cpu_affinity"):
            config_dict.setdefault(key, False)
        return config_dict

    @classmethod
    def from_values(cls: type[_C], values: dict[str, Any], where: str) -> _C:
        """Make one from the keys of a file.

        Args:
            values: The keys and values.
            where: The file's name, for errors.

        Returns:
            The configuration.

        Raises:
            InvalidValueError: There are unknown keys, or no `distributed_type`.
        """
        values = cls.process_config(dict(values))
        names = {each.name for each in fields(cls)}
        own = {*settings_by_key(""), *sections()}
        unknown = sorted(set(values) - names - own)
        if unknown:
            hints = [hint for hint in (did_you_mean(key, [*names, *own]) for key in unknown) if hint]
            raise InvalidValueError(
                f"{where} has unknown keys: {', '.join(unknown)}",
                "Neither Accelerate nor paceline reads them",
                " ".join(hints) or "Remove them",
            )
        config = cls(**{key: value for key, value in values.items() if key in names})
        vars(config).update({key: value for key, value in values.items() if key not in names})
        return config

    @classmethod
    def from_json_file(cls: type[_C], json_file: str | os.PathLike[str] | None = None) -> _C:
        """Read a file in JSON; None reads the default one."""
        file = os.fspath(json_file or default_json_config_file)
        return cls.from_values(json.loads(Path(file).read_text(encoding="utf-8")), file)

    @classmethod
    def from_yaml_file(cls: type[_C], yaml_file: str | os.PathLike[str] | None = None) -> _C:
        """Read a file in YAML; None reads the default one."""
        file = os.fspath(yaml_file or default_yaml_config_file)
        return cls.from_values(yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}, file)

    def to_json_file(self, json_file: str | os.PathLike[str]) -> None:
        """Write a file in JSON."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        Path(json_file).write_text(f"{text}\n", encoding="utf-8")

    def to_yaml_file(self, yaml_file: str | os.PathLike[str]) -> None:
        """Write a file in YAML."""
        Path(yaml_file).write_text(yaml.safe_dump(self.to_dict()), encoding="utf-8")


@dataclass
class ClusterConfig(BaseConfig):
    """The configuration of this machine, or of several."""

    num_processes: int = -1
    machine_rank: int = 0
    num_machines: int = 1
    gpu_ids: str | None = None
    main_process_ip: str | None = None
    main_process_port: int | None = None
    rdzv_backend: str | None = "static"
    same_network: bool | None = False
    main_training_function: str = "main"
    enable_cpu_affinity: bool = False
    fp8_config: dict[str, Any] | None = None
    deepspeed_config: dict[str, Any] | None = None
    fsdp_config: dict[str, Any] | None = None
    parallelism_config: dict[str, Any] | None = None
    megatron_lm_config: dict[str, Any] | None = None
    mpirun_config: dict[str, Any] | None = None
    downcast_bf16: bool = False
    tpu_name: str | None = None
    tpu_zone: str | None = None
    tpu_use_cluster: bool = False
    tpu_use_sudo: bool = False
    command_file: str | None = None
    commands: list[str] | None = None
    tpu_vm: list[str] | None = None
    tpu_env: list[str] | None = None
    dynamo_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Turn names into members, and sections that are None into empty ones."""
        super().__post_init__()
        for name in sections():
            if name in vars(self):
                setattr(self, name, getattr(self, name) or {})


@dataclass
class SageMakerConfig(BaseConfig):
    """The configuration of a job on Amazon SageMaker: it can be read and written; a launch refuses it."""

    ec2_instance_type: str
    iam_role_name: str
    image_uri: str | None = None
    profile: str | None = None
    region: str = "us-east-1"
    num_machines: int = 1
    gpu_ids: str = "all"
    base_job_name: str = "accelerate-sagemaker-1"
    pytorch_version: str = SAGEMAKER_PYTORCH_VERSION
    transformers_version: str = SAGEMAKER_TRANSFORMERS_VERSION
    py_version: str = SAGEMAKER_PYTHON_VERSION
    sagemaker_inputs_file: str | None = None
    sagemaker_metrics_file: str | None = None
    additional_args: dict[str, Any] | None = None
    dynamo_config: dict[str, Any] | None = None
    enable_cpu_affinity: bool = False
