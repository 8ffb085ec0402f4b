"""Which packages and devices this machine has. Packages are looked up without importing them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from packaging.version import parse

from paceline.compat.accelerate.settings.enums import DistributedType
from paceline.compat.accelerate.settings.errors import InvalidValueError
from paceline.compat.accelerate.settings.variables import parse_flag_from_env, patch_environment
from paceline.compat.accelerate.state import AcceleratorState, is_initialized
from paceline.compat.accelerate.utils.versions import compare_versions, is_torch_version
from paceline.environment.device import supported_precisions
from paceline.errors import MissingExtraError

F = TypeVar("F", bound=Callable[..., Any])


def _version(package: str, *distributions: str) -> str | None:
    """The version of a package that can be imported; None if it is missing, or a mere folder of that name."""
    if find_spec(package) is None:
        return None
    for distribution in distributions or (package,):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def _package(package: str, *distributions: str, at_least: str = "", below: str = "") -> Callable[[], bool]:
    """Make a function that says whether a package is installed.

    Args:
        package: The name to import.
        *distributions: The names to install it by, if they differ.
        at_least: The least version.
        below: The first version that is too new.
    """

    def is_available() -> bool:
        installed = _version(package, *distributions)
        if installed is None:
            return False
        wanted = [(">=", at_least), ("<", below)]
        return all(compare_versions(parse(installed), sign, bound) for sign, bound in wanted if bound)

    is_available.__doc__ = f"Whether {package} is installed."
    return is_available


def _device(name: str, plugin: str = "") -> Callable[[bool], bool]:
    """Make a function that says whether there is a device of a kind, which a plugin may add to torch."""

    def is_available(check_device: bool = False) -> bool:
        if plugin:
            if find_spec(plugin) is None:
                return False
            import_module(plugin)
        module = getattr(torch, name, None)
        try:
            return module is not None and bool(module.is_available())
        except RuntimeError:  # a driver without a device
            return False

    is_available.__doc__ = f"Whether there is a device of the kind {name}."
    return is_available


# Trackers
is_aim_available = _package("aim", below="4.0.0")
is_clearml_available = _package("clearml")
is_comet_ml_available = _package("comet_ml")
is_dvclive_available = _package("dvclive")
is_mlflow_available = _package("mlflow", "mlflow", "mlflow-skinny")
is_swanlab_available = _package("swanlab")
is_trackio_available = _package("trackio")
is_wandb_available = _package("wandb")

# Libraries
is_amdsmi_available = _package("amdsmi")
is_boto3_available = _package("boto3")
is_datasets_available = _package("datasets")
is_deepspeed_available = _package("deepspeed")
is_import_timer_available = _package("import_timer")
is_lomo_available = _package("lomo_optim")
is_matplotlib_available = _package("matplotlib")
is_msamp_available = _package("msamp", "ms-amp")
is_pandas_available = _package("pandas")
is_peft_available = _package("peft")
is_pynvml_available = _package("pynvml", "pynvml", "nvidia-ml-py")
is_pytest_available = _package("pytest")
is_sagemaker_available = _package("sagemaker")
is_schedulefree_available = _package("schedulefree")
is_timm_available = _package("timm")
is_torchao_available = _package("torchao", at_least="0.6.1")
is_torchdata_available = _package("torchdata")
is_torchdata_stateful_dataloader_available = _package("torchdata", at_least="0.8.0")
is_torchvision_available = _package("torchvision")
is_tqdm_available = _package("tqdm")
is_transformer_engine_available = _package("transformer_engine", "transformer-engine")
is_transformers_available = _package("transformers")
is_triton_available = _package("triton", "triton", "triton-xpu")
is_4bit_bnb_available = _package("bitsandbytes", at_least="0.39.0")
is_8bit_bnb_available = _package("bitsandbytes", at_least="0.37.2")

# Devices
is_mlu_available = _device("mlu", "torch_mlu")
is_musa_available = _device("musa", "torch_musa")
is_neuron_available = _device("neuron", "torch_neuronx")
is_npu_available = _device("npu", "torch_npu")
is_sdaa_available = _device("sdaa", "torch_sdaa")
is_xpu_available = _device("xpu")


def is_tensorboard_available() -> bool:
    """Whether TensorBoard or tensorboardX is installed."""
    return _package("tensorboard")() or _package("tensorboardX")()


def is_rich_available() -> bool:
    """Whether rich is installed, and `ACCELERATE_ENABLE_RICH` is set."""
    return _package("rich")() and parse_flag_from_env("ACCELERATE_ENABLE_RICH")


def is_bnb_available(min_version: str | None = None) -> bool:
    """Whether bitsandbytes is installed, in a version of at least `min_version`."""
    return _package("bitsandbytes", at_least=min_version or "")()


def is_bitsandbytes_multi_backend_available() -> bool:
    """Whether bitsandbytes runs on devices other than CUDA's."""
    return is_bnb_available() and "multi_backend" in getattr(import_module("bitsandbytes"), "features", set())


def is_numpy_available(min_version: str = "1.25.0") -> bool:
    """Whether NumPy has at least a version."""
    return compare_versions("numpy", ">=", min_version)


def is_transformer_engine_mxfp8_available() -> bool:
    """Whether Transformer Engine computes in blocks of 8-bit floats on this device."""
    return is_transformer_engine_available() and bool(
        import_module("transformer_engine.pytorch.fp8").check_mxfp8_support()[0]
    )


def is_megatron_lm_available() -> bool:
    """Whether Megatron-LM is used; paceline never does."""
    return False


def is_pippy_available() -> bool:
    """Whether torch has pipeline parallelism."""
    return is_torch_version(">=", "2.4.0")


def is_weights_only_available() -> bool:
    """Whether `torch.load` can be limited to safe classes."""
    return is_torch_version(">=", "2.4.0")


def is_torch_distributed_available() -> bool:
    """Whether torch has `torch.distributed`."""
    return dist.is_available()


def is_torch_xla_available(check_is_tpu: bool = False, check_is_gpu: bool = False) -> bool:
    """Whether this is a run on torch_xla; paceline never is."""
    return False


def is_xccl_available() -> bool:
    """Whether torch has the backend of Intel's GPUs."""
    return dist.is_available() and dist.distributed_c10d.is_xccl_available()


def is_cuda_available() -> bool:
    """Whether there is a CUDA device; CUDA is not initialized by asking."""
    with patch_environment(PYTORCH_NVML_BASED_CUDA_CHECK="1"):
        return torch.cuda.is_available()


def is_rocm_available() -> bool:
    """Whether torch is built for AMD's GPUs, and there is one."""
    return torch.version.hip is not None and torch.cuda.is_available()


def is_mps_available(min_version: str = "1.12") -> bool:
    """Whether there is an Apple GPU."""
    return is_torch_version(">=", min_version) and torch.backends.mps.is_available()


def is_hpu_available(init_hccl: bool = False) -> bool:
    """Whether there is a Gaudi device."""
    if find_spec("habana_frameworks") is None or find_spec("habana_frameworks.torch") is None:
        return False
    import_module("habana_frameworks.torch")
    if init_hccl:
        import_module("habana_frameworks.torch.distributed.hccl")
    return hasattr(torch, "hpu") and bool(torch.hpu.is_available())


def is_habana_gaudi1() -> bool:
    """Whether the Gaudi device is of the first generation."""
    if not is_hpu_available():
        return False
    device = import_module("habana_frameworks.torch.utils.experimental")
    return bool(device._get_device_type() == device.synDeviceType.synDeviceGaudi)


def is_bf16_available(ignore_tpu: bool = False) -> bool:
    """Whether this process's device computes in bf16."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return "bf16" in supported_precisions(device)


def is_fp16_available() -> bool:
    """Whether the device computes in fp16."""
    return not is_habana_gaudi1()


def is_fp8_available() -> bool:
    """Whether a library for 8-bit floats is installed."""
    return is_msamp_available() or is_transformer_engine_available() or is_torchao_available()


def torchao_required(func: F) -> F:
    """Make a function raise `MissingExtraError` without torchao."""

    @functools.wraps(func)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not is_torchao_available():
            raise MissingExtraError("torchao", "torchao", func.__name__)
        return func(*args, **kwargs)

    return checked  # type: ignore[return-value]


def deepspeed_required(func: F) -> F:
    """Make a function raise `InvalidValueError` in a run without DeepSpeed."""

    @functools.wraps(func)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if is_initialized() and AcceleratorState().distributed_type != DistributedType.DEEPSPEED:
            raise InvalidValueError(
                f"{func.__name__} was called in a run without DeepSpeed",
                "It needs DeepSpeed's configuration",
                "Pass Accelerator(deepspeed_plugin=...)",
            )
        return func(*args, **kwargs)

    return checked  # type: ignore[return-value]
