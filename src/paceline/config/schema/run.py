"""The whole configuration file as one model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from paceline.config.schema.base import Key, Section
from paceline.config.schema.deepspeed import DeepSpeedPlugin
from paceline.config.schema.dynamo import TorchDynamoPlugin
from paceline.config.schema.fp8 import FP8Config
from paceline.config.schema.fsdp import FullyShardedDataParallelPlugin
from paceline.config.schema.kwargs import DistributedDataParallelKwargs
from paceline.config.schema.megatron import MegatronLMConfig, MpirunConfig
from paceline.config.schema.parallelism import ParallelismConfig
from paceline.config.schema.readers import Names

DistributedType = Literal[
    "NO",
    "MULTI_CPU",
    "MULTI_GPU",
    "MULTI_NPU",
    "MULTI_MLU",
    "MULTI_SDAA",
    "MULTI_MUSA",
    "MULTI_XPU",
    "MULTI_HPU",
    "MULTI_NEURON",
    "DEEPSPEED",
    "FSDP",
    "XLA",
    "MEGATRON_LM",
]
StrategyName = Literal["auto", "single", "ddp", "fsdp", "deepspeed"]
_STRATEGIES = (
    ("auto", "the least sharding that fits the memory"),
    ("single", "one process"),
    ("ddp", "the whole model on each device"),
    ("fsdp", "the model sharded over the devices (FSDP2)"),
    ("deepspeed", "DeepSpeed's ZeRO, with offload"),
)
Precision = Literal["no", "fp16", "bf16", "fp8"]
_PRECISIONS = (
    ("no", "fp32 throughout"),
    ("fp16", "16 bits, with loss scaling"),
    ("bf16", "16 bits with the range of fp32"),
    ("fp8", "bf16, with the matrix products of large layers in 8 bits (torchao)"),
)
AttentionKernels = Literal["auto", "torch", "flash-attn-4"]
Count = Annotated[int, Field(ge=1)]


def _as_device_list(value: Any) -> Any:
    """Write device indices as one comma-separated string without blanks."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, (list, tuple)):
        return ",".join(str(part) for part in value)
    return value


def _device_list(value: str | None) -> str | None:
    if value is None:
        return None
    ids = [part.strip() for part in value.split(",")]
    if not all(ids):
        raise ValueError("it must be `all` or comma-separated device indices, for example 0,1,3")
    if len(set(ids)) != len(ids):
        raise ValueError("a device is listed twice")
    return ",".join(ids)


_LOOSE_LIST = WithJsonSchema(
    {"anyOf": [{"type": ["string", "integer"]}, {"type": "array", "items": {"type": "integer"}}]}
)
DeviceList = Annotated[str | None, BeforeValidator(_as_device_list), AfterValidator(_device_list), _LOOSE_LIST]


def _machines(value: int | str) -> int | str:
    """Check a number of machines, or a range of them; a range of one number is that number."""
    low, _, high = str(value).partition(":")
    if not low.isdecimal() or (":" in str(value) and not high.isdecimal()):
        raise ValueError("it must be a number of machines, or MIN:MAX such as 2:4")
    least, most = int(low), int(high or low)
    if least < 1 or most < least:
        raise ValueError("it must be at least 1, and MIN must not be greater than MAX")
    return most if least == most else f"{least}:{most}"


Machines = Annotated[int | str, AfterValidator(_machines)]


class RunConfig(Section):
    """All settings of a training run."""

    compute_environment: Annotated[Literal["LOCAL_MACHINE"], Key(has_flag=False)] = Field(
        "LOCAL_MACHINE", description="Where processes are started; only LOCAL_MACHINE."
    )
    distributed_type: DistributedType | None = Field(
        None, description="Accelerate's name for the strategy; the own key is strategy."
    )
    strategy: Annotated[StrategyName, Key(labels=_STRATEGIES)] = Field(
        "auto", description="How the model is distributed over ranks; auto takes the least sharding that fits."
    )
    mixed_precision: Annotated[Precision, Key(labels=_PRECISIONS)] = Field(
        "no", description="Precision of forward and backward."
    )
    gradient_accumulation_steps: Annotated[Count, Key(counts="micro-batch")] = Field(
        1, description="Micro-batches per optimizer step."
    )
    num_processes: Annotated[Count | None, Key(counts="process")] = Field(
        None, description="Number of processes over all machines; none: one per device, two on a machine without."
    )
    num_machines: Annotated[Machines, Key(counts="machine")] = Field(
        1, description="Number of machines, or MIN:MAX under rdzv_backend c10d."
    )
    machine_rank: Annotated[int, Field(ge=0)] = Field(0, description="Rank of this machine, from 0.")
    main_process_ip: str | None = Field(
        None, description="Host name or address of machine 0, as the other machines reach it."
    )
    main_process_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None,
        description="Port of the rendezvous on machine 0; 0 or none: a free port on one machine, 29500 on several.",
    )
    rdzv_backend: str = Field(
        "static", description="Rendezvous backend: static, or c10d, under which machines may come and go."
    )
    rdzv_conf: str | None = Field(
        None, description="Options of the rendezvous, as key=value,key=value; times in seconds."
    )
    same_network: bool = Field(
        True, description="Let ranks communicate over the network interface that leads to machine 0."
    )
    preflight: bool = Field(
        True, description="Before the ranks start, check that the machines reach each other and have the same versions."
    )
    gpu_ids: DeviceList = Field(None, description="Devices of this machine to use: all, or indices such as 0,1,3.")
    use_cpu: Annotated[bool, Key(flag="cpu")] = Field(False, description="Train on the CPU even where there are GPUs.")
    as_accelerate: bool = Field(
        False,
        description="Let `import accelerate` find paceline's stand-in in the script, so that what is written for "
        "Accelerate runs on paceline.",
    )
    debug: bool = Field(
        False, description="Check before each collective that all ranks pass the same shapes; slow, for debugging."
    )
    timeout: Annotated[Annotated[float, Field(gt=0)] | None, Key(unit="s")] = Field(
        None,
        description="Seconds a collective may wait before it fails; none: torch's default (NCCL 600, gloo 1800).",
    )
    hang_timeout: Annotated[Annotated[float, Field(ge=0)] | None, Key(unit="s")] = Field(
        None,
        description="Seconds that a collective may wait before the run ends with a report of where every rank is; "
        "none: 90 % of timeout; 0: never.",
    )
    max_restarts: Annotated[int, Field(ge=0), Key(counts="restart")] = Field(
        0, description="How many times failed workers are restarted."
    )
    monitor_interval: Annotated[float, Field(gt=0), Key(unit="s")] = Field(
        0.1, description="Seconds between checks of the workers."
    )
    num_cpu_threads_per_process: Annotated[Count | None, Key(counts="thread")] = Field(
        None, description="OMP_NUM_THREADS of each process; none: the cores divided by the processes of the machine."
    )
    enable_cpu_affinity: bool = Field(False, description="Pin each process to the CPU cores near its device.")
    main_training_function: str = Field("main", description="Function that a TPU process would call; not supported.")
    downcast_bf16: bool = Field(False, description="Compute fp32 in bf16 on a TPU; not supported.")
    tpu_name: str | None = Field(None, description="Name of the TPU; not supported.")
    tpu_zone: str | None = Field(None, description="Zone of the TPU; not supported.")
    tpu_use_cluster: Annotated[bool, Key(flag="tpu_cluster")] = Field(
        False, description="Start on a TPU pod; not supported."
    )
    tpu_use_sudo: bool = Field(False, description="Run commands on the TPU as root; not supported.")
    tpu_vm: Annotated[Names, Key(flag="vm")] = Field((), description="Machines of the TPU pod; not supported.")
    tpu_env: Annotated[Names, Key(flag="env")] = Field((), description="Variables set on the TPU pod; not supported.")
    commands: Annotated[Names, Key(has_flag=False)] = Field(
        (), description="Commands run on the TPU pod; not supported."
    )
    command_file: Annotated[str | None, Key(has_flag=False)] = Field(
        None, description="File of those commands; not supported."
    )
    ddp_config: DistributedDataParallelKwargs = Field(
        default_factory=DistributedDataParallelKwargs, description="How DDP averages gradients (strategy ddp)."
    )
    fsdp_config: FullyShardedDataParallelPlugin | None = Field(None, description="How FSDP2 shards (strategy fsdp).")
    deepspeed_config: DeepSpeedPlugin | None = Field(
        None, description="How DeepSpeed shards and offloads (strategy deepspeed)."
    )
    parallelism_config: ParallelismConfig | None = Field(None, description="Sizes of the device mesh (strategy fsdp).")
    fp8_config: FP8Config | None = Field(None, description="How fp8 matrix products are scaled (mixed_precision fp8).")
    dynamo_config: TorchDynamoPlugin = Field(
        default_factory=TorchDynamoPlugin, description="How models are compiled by torch.compile."
    )
    attention_kernels: AttentionKernels = Field(
        "auto",
        description="Kernels behind torch's scaled_dot_product_attention. auto: on a Hopper GPU those of the package "
        "flash-attn-4, if it is installed, where they are faster; torch: torch's own; flash-attn-4: or an error.",
    )
    mpirun_config: MpirunConfig | None = Field(None, description="How mpirun starts the processes of a run on CPUs.")
    megatron_lm_config: MegatronLMConfig | None = Field(
        None, description="How Megatron-LM would divide the model; not supported."
    )

    @property
    def min_machines(self) -> int:
        """How many machines must take part."""
        return int(str(self.num_machines).partition(":")[0])

    @property
    def max_machines(self) -> int:
        """How many machines can take part."""
        return int(str(self.num_machines).rpartition(":")[2])

    @property
    def spans_machines(self) -> bool:
        """Whether DeepSpeed's launcher has to start the ranks: there are several machines, or a host file."""
        plugin = self.deepspeed_config
        if plugin is None or plugin.deepspeed_multinode_launcher == "standard":
            return False
        return self.max_machines > 1 or plugin.deepspeed_hostfile is not None
