"""The questions of the questionnaire, their order, and when each matters.

Only the wording is here; types, choices and limits come from the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from paceline.config import Origin, Resolved, resolve
from paceline.config.schema.names import all_settings
from paceline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from paceline.cli.config.machine import Machine
    from paceline.config.schema.base import Setting

__all__ = ["QUESTIONS", "Question", "Situation"]


@dataclass(frozen=True, slots=True)
class Situation:
    """The machine and the answers so far, by dotted key."""

    machine: Machine
    answers: Mapping[str, object]

    def value(self, key: str) -> Any:
        """Return the answer to a question, or the default of the schema."""
        return self.answers.get(key, all_settings()[key].default)

    @property
    def devices(self) -> int:
        """Accelerators that the run may use on this machine."""
        if self.value("use_cpu"):
            return 0
        return self.machine.devices

    @property
    def processes(self) -> int:
        """Processes over all machines, as far as known."""
        answer = self.answers.get("num_processes")
        if isinstance(answer, int):
            return answer
        return self.default_processes

    @property
    def default_processes(self) -> int:
        """Processes that a launch would start on each machine, times the machines."""
        per_machine = self.devices if self.machine.devices and self.devices else min(2, self.machine.processes)
        return max(1, per_machine) * self.machines

    @property
    def machines(self) -> int:
        """The maximum number of machines."""
        return int(str(self.value("num_machines")).rpartition(":")[2])

    def problems(self, answers: Mapping[str, object]) -> set[Problem]:
        """Return what is wrong with these answers as a configuration."""
        try:
            self._resolve(answers)
        except ConfigError as error:
            return set(error.problems)
        return set()

    def new_problems(self, question: Question, value: object) -> list[Problem]:
        """Return the problems that one more answer would cause and no later answer can fix."""
        with_it = {**self.answers, question.key: value, **question.along.get(str(value), {})}
        before = {(problem.key, problem.what) for problem in self.problems(self.answers)}
        found = self.problems({key: given for key, given in with_it.items() if given is not None})
        open_keys = {other.key for other in QUESTIONS} - {*self.answers, question.key}
        return [p for p in found if (p.key, p.what) not in before and p.key not in open_keys]

    def is_set_by_another(self, key: str) -> bool:
        """Whether another answer, such as DeepSpeed's JSON, already sets a key."""
        try:
            origin: Origin = self._resolve(self.answers).origin(key)
        except ConfigError:
            return False
        return key not in self.answers and origin.is_explicit

    def _resolve(self, answers: Mapping[str, object]) -> Resolved:
        flags = {all_settings()[key].flag: value for key, value in answers.items()}
        return resolve(flags=flags, env={}, file=None)


When = Callable[[Situation], bool]


@dataclass(frozen=True, slots=True)
class Question:
    """One setting to ask for.

    Attributes:
        key: The dotted key; the schema says its type and its choices.
        text: The question.
        when: Whether it matters in a situation.
        default: The suggested answer in a situation; without it, the schema's default.
        only: The choices to show, where the schema has many more.
        along: Answers that a choice needs from later questions, so that the choice alone is not a problem.
        meanings: The meaning of each choice whose name is not clear.
        needed: Why an answer is required; empty where it is not.
    """

    key: str
    text: str
    when: When = lambda _: True
    default: Callable[[Situation], object] | None = None
    only: tuple[str, ...] = ()
    along: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    meanings: Mapping[str, str] = field(default_factory=dict)
    needed: str = ""

    @property
    def setting(self) -> Setting:
        """The setting of the schema."""
        return all_settings()[self.key]

    def matters(self, now: Situation) -> bool:
        """Whether to ask the question."""
        return self.when(now) and not now.is_set_by_another(self.key)

    def suggestion(self, now: Situation) -> object:
        """Return the answer that Enter selects."""
        if self.default is None:
            return self.setting.default
        return self.default(now)

    def choices(self, now: Situation) -> list[object]:
        """Return the possible answers; empty for a question that takes text."""
        shape = self.setting.shape
        if shape.kind == "bool":
            answers: list[object] = [True, False]
        elif shape.kind == "choice":
            named = [choice for choice in shape.choices if not self.only or choice in self.only]
            answers = [None, *named] if shape.nullable else named
        else:
            return []
        return [
            choice for choice in answers if not _cannot(self.key, choice, now) and not now.new_problems(self, choice)
        ]


def _cannot(key: str, choice: object, now: Situation) -> bool:
    """Whether the machine does not support a choice."""
    if key == "strategy":
        return (choice == "deepspeed" and not now.machine.has_deepspeed) or (choice == "ddp" and now.processes == 1)
    return key == "mixed_precision" and choice not in now.machine.precisions


def _several_machines(now: Situation) -> bool:
    return now.machines > 1


def _rendezvous(now: Situation) -> object:
    """A range of machines needs c10d."""
    if ":" in str(now.value("num_machines")):
        return "c10d"
    return "static"


def _strategy(name: str) -> When:
    return lambda now: now.value("strategy") == name


def _zero(*, stage: int = 0) -> When:
    """Under DeepSpeed, unless its own JSON is used."""
    return lambda now: (
        now.value("strategy") == "deepspeed"
        and now.value(_DS_FILE) is None
        and now.value("deepspeed_config.zero_stage") >= stage
    )


def _answered(key: str, value: object) -> When:
    return lambda now: now.value(key) == value


def _both(one: When, other: When) -> When:
    return lambda now: one(now) and other(now)


def _precision(now: Situation) -> object:
    if not now.devices:
        return "no"
    return "bf16" if "bf16" in now.machine.precisions else "fp16"


def _device_list(now: Situation) -> object:
    return ",".join(map(str, range(now.processes)))


def _chooses_devices(now: Situation) -> bool:
    return now.machines == 1 and 0 < now.processes < now.devices


_DS_FILE: Final = "deepspeed_config.deepspeed_config_file"


def _deepspeed(name: str) -> str:
    return f"deepspeed_config.{name}"


def _fsdp(name: str) -> str:
    return f"fsdp_config.fsdp_{name}"


_WHERE: Final = {
    "none": "on the device",
    "cpu": "in host memory: saves device memory, costs some speed",
    "nvme": "on an NVMe disk: for models larger than the host's memory, slower still",
}
_YES_NO: Final = {"true": "yes", "false": "no"}


def _offload(part: str, what: str, stage: int) -> tuple[Question, Question]:
    device, folder = _deepspeed(f"offload_{part}_device"), _deepspeed(f"offload_{part}_nvme_path")
    return (
        Question(
            device,
            f"Where should {what} be kept between steps?",
            _zero(stage=stage),
            along={"nvme": {folder: "nvme"}},
            meanings=_WHERE,
        ),
        Question(
            folder,
            f"Which folder on the NVMe disk may hold {what}?",
            _both(_zero(stage=stage), _answered(device, "nvme")),
            default=lambda _: "/local_nvme",
        ),
    )


_MACHINES: Final = (
    Question("num_machines", "How many machines train together? (2:4 for a number that may change while it runs)"),
    Question(
        "machine_rank",
        "Which of the machines is this one? (0 is the first)",
        _several_machines,
        lambda now: int(now.machine.env.get("SLURM_NODEID", "0")),
    ),
    Question(
        "main_process_ip",
        "What is the address of machine 0, as the other machines reach it?",
        _several_machines,
        lambda now: now.machine.env.get("MASTER_ADDR"),
    ),
    Question(
        "main_process_port",
        "Which port on machine 0 is free for the machines to meet at?",
        _several_machines,
        lambda _: 29500,
    ),
    Question(
        "rdzv_backend",
        "May machines come and go during the run?",
        _several_machines,
        _rendezvous,
        meanings={
            "static": "no: all take part from beginning to end",
            "c10d": "yes: torch elastic's rendezvous on machine 0",
        },
    ),
)

_PROCESSES: Final = (
    Question("use_cpu", "Train on the CPU and not on the GPUs?", lambda now: now.machine.devices > 0, meanings=_YES_NO),
    Question(
        "num_processes",
        "How many processes in total, over all machines? (one for each GPU is usual)",
        lambda now: _several_machines(now) or now.devices != 1,
        lambda now: now.default_processes,
    ),
    Question("gpu_ids", "Which GPUs of this machine? (their numbers, such as 0,1)", _chooses_devices, _device_list),
    Question(
        "strategy",
        "How should training be spread over the processes?",
        lambda now: now.processes > 1 or now.devices > 0,
        meanings={
            "auto": "decide when the model is known: the least sharding that fits in memory",
            "single": "one process, nothing spread",
            "ddp": "DDP: every device holds the whole model; fastest where it fits",
            "fsdp": "FSDP2: the model is sharded over the devices; for models too large for one",
            "deepspeed": "DeepSpeed ZeRO: sharding, with offload to host memory or disk",
        },
    ),
)

_DEEPSPEED: Final = (
    Question(_DS_FILE, "Do you have a DeepSpeed JSON file? (its path, or none)", _strategy("deepspeed")),
    Question(
        _deepspeed("zero_stage"),
        "Which ZeRO stage?",
        _zero(),
        meanings={
            "0": "nothing is sharded",
            "1": "the optimizer's state is sharded",
            "2": "gradients too",
            "3": "parameters too: least memory, most communication",
        },
    ),
    *_offload("optimizer", "the optimizer's state", 1),
    *_offload("param", "the parameters", 3),
    Question(
        _deepspeed("zero3_save_16bit_model"),
        "When a model is saved, gather its weights into ordinary 16-bit files?",
        _zero(stage=3),
        meanings=_YES_NO,
    ),
    Question(
        _deepspeed("gradient_clipping"), "Clip gradients to which norm? (auto: what the script clips to)", _zero()
    ),
    Question(
        _deepspeed("deepspeed_multinode_launcher"),
        "Which program should start the processes on the other machines?",
        _both(_strategy("deepspeed"), _several_machines),
        meanings={"standard": "none: run this command on every machine"},
    ),
)

_FSDP: Final = (
    Question(
        _fsdp("offload_params"),
        "Keep parameters and optimizer state in host memory? (saves device memory, costs speed)",
        _strategy("fsdp"),
        meanings=_YES_NO,
    ),
    Question(
        _fsdp("auto_wrap_policy"),
        "Into which blocks should the model be cut for sharding?",
        _strategy("fsdp"),
        meanings={
            "None": "find them: the model's own hint, else its repeated blocks",
            "TRANSFORMER_BASED_WRAP": "the classes that you name",
            "SIZE_BASED_WRAP": "by number of parameters",
            "NO_WRAP": "none: the whole model is one block",
        },
    ),
    Question(
        _fsdp("transformer_layer_cls_to_wrap"),
        "What is the class of the repeated block? (for example LlamaDecoderLayer; several with commas)",
        _answered(_fsdp("auto_wrap_policy"), "TRANSFORMER_BASED_WRAP"),
        needed="TRANSFORMER_BASED_WRAP needs the name of a class; go back and take none to have the blocks found",
    ),
    Question(
        _fsdp("min_num_params"),
        "How many parameters must a block have at least?",
        _answered(_fsdp("auto_wrap_policy"), "SIZE_BASED_WRAP"),
    ),
    Question(
        _fsdp("activation_checkpointing"),
        "Recompute activations in the backward pass? (saves much memory, costs about a third of the speed)",
        _strategy("fsdp"),
        meanings=_YES_NO,
    ),
    Question(
        _fsdp("state_dict_type"),
        "How should checkpoints be written?",
        _strategy("fsdp"),
        meanings={
            "SHARDED_STATE_DICT": "every rank writes its own shards: fast, any number of ranks can load them",
            "FULL_STATE_DICT": "whole tensors, gathered first",
        },
    ),
    Question(
        "parallelism_config.parallelism_config_dp_replicate_size",
        "How many copies of the sharded model? (1: sharded over all devices; one a machine: less traffic between them)",
        _both(_strategy("fsdp"), _several_machines),
    ),
)

_TRAINING: Final = (
    Question(
        "mixed_precision",
        "Which precision for the forward and backward pass?",
        default=_precision,
        meanings={
            "no": "fp32 throughout",
            "fp16": "16 bits with loss scaling, for GPUs without bf16",
            "bf16": "16 bits with the range of fp32: the usual choice on current GPUs",
            "fp8": "8 bits, on GPUs that have them",
        },
    ),
    Question("gradient_accumulation_steps", "How many batches of each process make one optimizer step?"),
    Question(
        "dynamo_config.dynamo_backend",
        "Compile the model with torch.compile?",
        lambda now: now.devices > 0,
        only=("auto", "no", "inductor", "cudagraphs"),
        meanings={
            "auto": "repeated blocks, once that pays",
            "no": "do not compile",
            "inductor": "torch's own compiler: faster steps after a slow first one",
            "cudagraphs": "CUDA graphs only: for small models with fixed shapes",
        },
    ),
    Question(
        "dynamo_config.dynamo_use_regional_compilation",
        "Compile one repeated block instead of the whole model? (starts much faster)",
        lambda now: now.value("dynamo_config.dynamo_backend") not in (None, "no", "auto"),
        meanings=_YES_NO,
    ),
)

QUESTIONS: Final = (*_MACHINES, *_PROCESSES, *_DEEPSPEED, *_FSDP, *_TRAINING)
"""In the order in which they are asked: later ones can depend on earlier answers."""
