"""Which settings the questionnaire asks for, in which order, and when one matters.

What is asked, the choices and what they mean come from the schema; here stand only the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from paceline.config import Origin, Resolved, resolve
from paceline.config.schema.names import places
from paceline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from paceline.cli.config.machine import Machine
    from paceline.config.schema.base import Slot

__all__ = ["QUESTIONS", "Question", "Situation"]


@dataclass(frozen=True, slots=True)
class Situation:
    """The machine, and what has been answered so far, by dotted key."""

    machine: Machine
    answers: Mapping[str, object]

    def value(self, key: str) -> Any:
        """The answer to a question; the default of the schema while there is none."""
        return self.answers.get(key, places()[key].default)

    @property
    def devices(self) -> int:
        """Accelerators that the run may use on this machine."""
        return 0 if self.value("use_cpu") else self.machine.devices

    @property
    def processes(self) -> int:
        """Processes over all machines, as far as is known."""
        said = self.answers.get("num_processes")
        return said if isinstance(said, int) else self.default_processes

    @property
    def default_processes(self) -> int:
        """What a launch would start on each machine, times the machines."""
        per_machine = self.devices if self.machine.devices and self.devices else min(2, self.machine.processes)
        return max(1, per_machine) * self.machines

    @property
    def machines(self) -> int:
        """How many machines can take part."""
        return int(str(self.value("num_machines")).rpartition(":")[2])

    def problems(self, answers: Mapping[str, object]) -> set[Problem]:
        """What would be wrong with these answers as a configuration."""
        try:
            self._resolve(answers)
        except ConfigError as error:
            return set(error.problems)
        return set()

    def new_problems(self, question: Question, value: object) -> list[Problem]:
        """What one more answer would make wrong; what a later answer can still put right does not count."""
        with_it = {**self.answers, question.key: value, **question.along.get(str(value), {})}
        before = {(problem.key, problem.what) for problem in self.problems(self.answers)}
        found = self.problems({key: given for key, given in with_it.items() if given is not None})
        open_keys = {other.key for other in QUESTIONS} - {*self.answers, question.key}
        return [p for p in found if (p.key, p.what) not in before and p.key not in open_keys]

    def is_said_elsewhere(self, key: str) -> bool:
        """Whether another answer, such as DeepSpeed's JSON, already says what a key would."""
        try:
            origin: Origin = self._resolve(self.answers).origin(key)
        except ConfigError:
            return False
        return key not in self.answers and origin.is_explicit

    def _resolve(self, answers: Mapping[str, object]) -> Resolved:
        flags = {places()[key].flag: value for key, value in answers.items()}
        return resolve(flags=flags, env={}, file=None)


When = Callable[[Situation], bool]


@dataclass(frozen=True, slots=True)
class Question:
    """One setting to ask for.

    Attributes:
        key: The dotted key; the schema says the rest.
        when: Whether it matters.
        default: What the machine suggests; without it, the schema's default.
        only: The choices worth showing, when the schema has many more.
        along: What must be answered next after a choice, so that the choice alone is not taken for wrong.
    """

    key: str
    when: When = lambda _: True
    default: Callable[[Situation], object] | None = None
    only: tuple[str, ...] = ()
    along: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    @property
    def slot(self) -> Slot:
        """The setting in the schema."""
        return places()[self.key]

    def matters(self, now: Situation) -> bool:
        """Whether to ask it at all."""
        return self.when(now) and not now.is_said_elsewhere(self.key)

    def suggestion(self, now: Situation) -> object:
        """The answer that Enter gives."""
        return self.slot.default if self.default is None else self.default(now)

    def choices(self, now: Situation) -> list[object]:
        """The answers among which to choose; empty for a question that takes text."""
        shape = self.slot.shape
        if shape.kind == "bool":
            found: list[object] = [True, False]
        elif shape.kind == "choice":
            found = [choice for choice in shape.choices if not self.only or choice in self.only]
            found += [None] if shape.nullable else []
        else:
            return []
        return [choice for choice in found if not _cannot(self.key, choice, now) and not now.new_problems(self, choice)]


def _cannot(key: str, choice: object, now: Situation) -> bool:
    """Whether this machine lacks what a choice needs."""
    if key == "strategy":
        return (choice == "deepspeed" and not now.machine.has_deepspeed) or (choice == "ddp" and now.processes == 1)
    return key == "mixed_precision" and choice not in now.machine.precisions


def _several_machines(now: Situation) -> bool:
    return now.machines > 1


def _rendezvous(now: Situation) -> object:
    """A range of machines needs the rendezvous that lets them come and go."""
    return "c10d" if ":" in str(now.value("num_machines")) else "static"


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


def _offload(part: str, stage: int) -> tuple[Question, Question]:
    device, folder = _deepspeed(f"offload_{part}_device"), _deepspeed(f"offload_{part}_nvme_path")
    return (
        Question(device, _zero(stage=stage), along={"nvme": {folder: "nvme"}}),
        Question(folder, _both(_zero(stage=stage), _answered(device, "nvme")), default=lambda _: "/local_nvme"),
    )


QUESTIONS: Final = (
    Question("num_machines"),
    Question("machine_rank", _several_machines, lambda now: int(now.machine.env.get("SLURM_NODEID", "0"))),
    Question("main_process_ip", _several_machines, lambda now: now.machine.env.get("MASTER_ADDR")),
    Question("main_process_port", _several_machines, lambda _: 29500),
    Question("rdzv_backend", _several_machines, _rendezvous),
    Question("use_cpu", lambda now: now.machine.devices > 0),
    Question(
        "num_processes",
        lambda now: _several_machines(now) or now.devices != 1,
        lambda now: now.default_processes,
    ),
    Question("gpu_ids", _chooses_devices, _device_list),
    Question("strategy", lambda now: now.processes > 1 or now.devices > 0),
    Question(_DS_FILE, _strategy("deepspeed")),
    Question(_deepspeed("zero_stage"), _zero()),
    *_offload("optimizer", 1),
    *_offload("param", 3),
    Question(_deepspeed("zero3_save_16bit_model"), _zero(stage=3)),
    Question(_deepspeed("gradient_clipping"), _zero()),
    Question(_deepspeed("deepspeed_multinode_launcher"), _both(_strategy("deepspeed"), _several_machines)),
    Question(_fsdp("offload_params"), _strategy("fsdp")),
    Question(_fsdp("auto_wrap_policy"), _strategy("fsdp")),
    Question(_fsdp("transformer_layer_cls_to_wrap"), _answered(_fsdp("auto_wrap_policy"), "TRANSFORMER_BASED_WRAP")),
    Question(_fsdp("min_num_params"), _answered(_fsdp("auto_wrap_policy"), "SIZE_BASED_WRAP")),
    Question(_fsdp("activation_checkpointing"), _strategy("fsdp")),
    Question(_fsdp("state_dict_type"), _strategy("fsdp")),
    Question("parallelism_config.parallelism_config_dp_replicate_size", _both(_strategy("fsdp"), _several_machines)),
    Question("mixed_precision", default=_precision),
    Question("gradient_accumulation_steps"),
    Question("dynamo_config.dynamo_backend", lambda now: now.devices > 0, only=("no", "inductor", "cudagraphs")),
    Question(
        "dynamo_config.dynamo_use_regional_compilation",
        lambda now: now.value("dynamo_config.dynamo_backend") not in (None, "no"),
    ),
)
"""In the order in which they are asked: later ones may look at earlier answers."""
