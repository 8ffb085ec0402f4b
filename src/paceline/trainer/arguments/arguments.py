"""`TrainingArguments`: all settings of a training run, checked when it is constructed."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from paceline.accelerator.accelerator import Accelerator
from paceline.config import InitProcessGroupKwargs
from paceline.environment.world import World
from paceline.errors import ConfigError, PrepareError, Problem
from paceline.trainer.argument_errors import WHERE, field_error, field_problem, located
from paceline.trainer.arguments.checks import fill_dependent_values, find_problems, read_short_forms
from paceline.trainer.arguments.command_line import parse_arguments
from paceline.trainer.arguments.fields import AllFields
from paceline.trainer.arguments.parsing import default_of, fields_of, read_file, read_value
from paceline.trainer.arguments.unknown_names import ABSENT, problems_with_unknown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    import torch
    from typing_extensions import Self

__all__ = ["BatchPlan", "ParallelMode", "TrainingArguments"]


class ParallelMode(Enum):
    """Whether several ranks train, under transformers' names."""

    NOT_PARALLEL = "not_parallel"
    DISTRIBUTED = "distributed"


class BatchPlan(NamedTuple):
    """How the samples of an optimizer step are split.

    Attributes:
        micro_batch: Samples of a micro-batch on each rank.
        accumulation: Micro-batches of an optimizer step.
    """

    micro_batch: int
    accumulation: int


@dataclass
class TrainingArguments(AllFields):
    """All settings of a training run: what to train, for how long, how, and where.

    Fields have transformers' names and meanings unless they say otherwise. All problems are reported at once.
    Instances can also be read from a file (`from_file`) or the command line (`parse`).

    Example:
        >>> args = TrainingArguments(output_dir="runs/a", learning_rate=3e-4, max_steps=100)
        >>> args.learning_rate
        0.0003
        >>> TrainingArguments(learning_rat=1.0)
        Traceback (most recent call last):
        ...
        paceline.errors.ConfigError: 1 problem in the configuration
          TrainingArguments(…): learning_rat: unknown name; did you mean learning_rate?
        <BLANKLINE>

    Raises:
        ConfigError: Unknown names, values of the wrong type, or values that contradict each other.
    """

    _origins: ClassVar[dict[str, str]] = {}
    ABSENT: ClassVar[dict[str, str]] = ABSENT

    def __new__(cls, *args: Any, **values: Any) -> Self:
        """Report unknown names with suggestions, before the generated constructor raises a bare TypeError."""
        known = fields_of(cls)
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(problems_with_unknown(cls, unknown, values, WHERE, args))
        made = super().__new__(cls)
        # Not a field: it describes where the values came from and is not a setting itself.
        made.__dict__["_origins"] = dict.fromkeys(values, WHERE)
        return made

    def __post_init__(self) -> None:
        problems: list[Problem] = []
        defaults = {field.name: default_of(field) for field in dataclasses.fields(self)}
        for name, hint in fields_of(type(self)).items():
            try:
                setattr(self, name, read_value(hint, getattr(self, name)))
            except ValueError as error:
                problems.append(field_problem(name, str(error)))
                # So that the other values can still be checked against each other.
                setattr(self, name, defaults[name])
        problems += read_short_forms(self)
        problems += find_problems(self)
        if problems:
            raise ConfigError(problems)
        fill_dependent_values(self)
        self._set_log_level()

    # Reading and writing

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **values: Any) -> Self:
        """Read a YAML or JSON file.

        Args:
            path: A file that maps field names to values; it ends in .yaml, .yml or .json.
            **values: Fields that override the file.

        Returns:
            The arguments; `origins` names the file and the line.

        Raises:
            ConfigError: The file cannot be read, or its values are invalid.

        Example:
            >>> from pathlib import Path
            >>> _ = Path("run.yaml").write_text("learning_rate: 1e-4")
            >>> args = TrainingArguments.from_file("run.yaml", max_steps=50)
            >>> args.origins()
            {'learning_rate': 'run.yaml:1', 'max_steps': 'TrainingArguments(…)'}
        """
        name = os.fspath(path)
        file = read_file(name)
        if file.problems:
            raise ConfigError(file.problems)
        sources = {key: where for key, where in file.sources.items() if key.partition(".")[0] not in values}
        try:
            made = cls(**{**file.values, **values})
        except ConfigError as error:
            raise ConfigError(located(error.problems, sources)) from None
        made.note_origins(sources)
        return made

    @classmethod
    def from_command_line(cls, argv: Sequence[str] | None = None) -> Self:
        """Read `--name value` flags, and a YAML or JSON file given as first word or with `--config`.

        Args:
            argv: The words of the command line; None takes `sys.argv[1:]`.

        Returns:
            The arguments; flags override the file.

        Raises:
            ConfigError: Unknown flags, or invalid values.

        Example:
            >>> TrainingArguments.from_command_line(["--max_steps", "50", "--bf16"]).max_steps
            50
        """
        (arguments,) = cls.parse(argv=argv)
        return arguments  # type: ignore[no-any-return]

    @classmethod
    def parse(cls, *others: type[Any], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Read the command line into this class and further dataclasses.

        Args:
            *others: Dataclasses whose fields become flags, too; no two may share a name.
            argv: The words of the command line; None takes `sys.argv[1:]`.

        Returns:
            One instance of this class and of each of the others, in that order.

        Raises:
            ConfigError: Unknown flags, or invalid values.

        Example:
            >>> from dataclasses import make_dataclass
            >>> DataArguments = make_dataclass("DataArguments", [("corpus", str, "wiki")])
            >>> args, data = TrainingArguments.parse(DataArguments, argv=["--seed", "1", "--corpus", "books"])
            >>> args.seed, data.corpus
            (1, 'books')
        """
        return parse_arguments((cls, *others), argv)

    @classmethod
    def describe(cls) -> str:
        """List the fields.

        Returns:
            A line for each field: `name = default: what it does`.

        Example:
            >>> print(TrainingArguments.describe().splitlines()[0])
            output_dir = 'trainer_output': Folder of checkpoints, logs and metrics.
        """
        fields = dataclasses.fields(cls)
        return "\n".join(f"{f.name} = {default_of(f)!r}: {f.metadata.get('help', '')}" for f in fields)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dictionary.

        Returns:
            All fields; values that JSON cannot represent as their `repr`.

        Example:
            >>> TrainingArguments(seed=1).to_dict()["seed"]
            1
        """
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Convert to a dictionary for experiment trackers.

        Returns:
            All fields, and `train_batch_size` and `eval_batch_size`; values are numbers or text.

        Example:
            >>> TrainingArguments(label_names=["labels"]).to_sanitized_dict()["label_names"]
            "['labels']"
        """
        kept = (bool, int, float, str)
        values = {**self.to_dict(), "train_batch_size": self.train_batch_size, "eval_batch_size": self.eval_batch_size}
        return {name: value if isinstance(value, kept) else str(value) for name, value in values.items()}

    def to_json_string(self) -> str:
        """Convert to JSON.

        Returns:
            `to_dict()` as an indented JSON object.

        Example:
            >>> import json
            >>> json.loads(TrainingArguments(seed=1).to_json_string())["seed"]
            1
        """
        return json.dumps(self.to_dict(), indent=2)

    def origins(self) -> dict[str, str]:
        """Say where each value that is not a default came from.

        Returns:
            For each such field a line of a file, a flag, `TrainingArguments(…)`, or `other arguments` if it follows
            from those.

        Example:
            >>> TrainingArguments(gradient_checkpointing=True).origins()["activation_checkpointing"]
            'other arguments'
        """
        fields, hints = dataclasses.fields(self), fields_of(type(self))
        changed = {f.name for f in fields if getattr(self, f.name) != read_value(hints[f.name], default_of(f))}
        written = {name for name in self._origins if name in hints}
        return {name: self._origins.get(name, "other arguments") for name in sorted(changed | written)}

    def note_origins(self, origins: Mapping[str, str]) -> None:
        """Record where values came from, for `origins`; parsers call it.

        Args:
            origins: The source of each field, and of keys inside one (`fsdp_config.min_num_params`): a line of a file,
                a flag, or whatever a person should read.
        """
        self._origins.update(origins)

    def config_error(self, problems: Iterable[Problem]) -> ConfigError:
        """Make an error of problems with fields, which names where each value was written.

        Args:
            problems: Problems at `TrainingArguments(…)`, whose keys are fields or keys inside one; others are kept.

        Returns:
            The error, to be raised.

        Example:
            >>> from paceline.errors import Problem
            >>> args = TrainingArguments.from_command_line(["--seed", "1"])
            >>> print(args.config_error([Problem("TrainingArguments(…)", "seed", "1 is taken")]))
            1 problem in the configuration
              --seed: 1 is taken
            <BLANKLINE>
        """
        return ConfigError(located(problems, self._origins))

    # Values derived from the fields

    @property
    def train_batch_size(self) -> int:
        """Samples of a training micro-batch on each rank; smaller than the field where the global batch requires it."""
        return self.batch_plan(self.world_size).micro_batch

    @property
    def eval_batch_size(self) -> int:
        """Samples of an evaluation batch on each rank."""
        return self.per_device_eval_batch_size

    def batch_plan(self, ranks: int, most: int | None = None) -> BatchPlan:
        """Split the samples of an optimizer step into micro-batches.

        With `global_batch_size`, micro-batches are as large as possible: at most `per_device_train_batch_size`, and
        a divisor of each rank's share of the global batch.

        Args:
            ranks: How many ranks share an optimizer step.
            most: Overrides `per_device_train_batch_size`; an optimizer step keeps its number of samples.

        Returns:
            The samples of a micro-batch on each rank, and the micro-batches of an optimizer step.

        Raises:
            ConfigError: `global_batch_size` is not a multiple of `ranks`.

        Example:
            >>> TrainingArguments(global_batch_size=64, per_device_train_batch_size=10).batch_plan(ranks=2)
            BatchPlan(micro_batch=8, accumulation=4)
        """
        most = self.per_device_train_batch_size if most is None else most
        total = self.global_batch_size
        if total is None:
            if most == self.per_device_train_batch_size:
                return BatchPlan(most, self.gradient_accumulation_steps)
            share = self.per_device_train_batch_size * self.gradient_accumulation_steps
        elif total % ranks:
            what = f"{total} cannot be divided among {ranks} ranks"
            raise field_error("global_batch_size", what, hint=f"choose a multiple of {ranks}")
        else:
            share = total // ranks
        micro = next(size for size in range(min(most, share), 0, -1) if share % size == 0)
        return BatchPlan(micro, share // micro)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Compute the length of the warmup.

        Args:
            num_training_steps: Optimizer steps of the whole training.

        Returns:
            The optimizer steps over which the learning rate rises from 0 to its peak.

        Example:
            >>> TrainingArguments(warmup_ratio=0.1).get_warmup_steps(500)
            50
        """
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        share = self.warmup_steps or self.warmup_ratio or 0.0
        return math.ceil(num_training_steps * share)

    def interval(self, name: str, total: int) -> int:
        """Convert an interval to steps; below 1, the field is a fraction of all steps.

        Args:
            name: `logging_steps`, `eval_steps` or `save_steps`.
            total: Optimizer steps of the whole training.

        Returns:
            The interval in optimizer steps, at least 1.

        Example:
            >>> TrainingArguments(save_steps=0.25).interval("save_steps", total=1000)
            250
        """
        value = getattr(self, name)
        if value is None:
            value = self.logging_steps
        if value < 1:
            value = max(1, math.ceil(total * value))
        return int(value)

    # The process that reads the arguments

    @property
    def world(self) -> World:
        """This process's rank and the number of ranks, from the launcher's environment variables."""
        return World.read(os.environ)

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.world.size

    @property
    def process_index(self) -> int:
        """This process's rank."""
        return self.world.rank

    @property
    def local_process_index(self) -> int:
        """This process's rank on its machine."""
        return self.world.local_rank

    @property
    def local_rank(self) -> int:
        """This process's rank on its machine; -1 without distributed training, as scripts for transformers expect."""
        return self.world.local_rank if self.world_size > 1 else -1

    @property
    def should_log(self) -> bool:
        """Whether this process writes logs: it is rank 0."""
        return self.world.is_main

    @property
    def should_save(self) -> bool:
        """Whether this process writes files of which the run has one: it is rank 0."""
        return self.world.is_main

    @property
    def parallel_mode(self) -> ParallelMode:
        """Whether several ranks train."""
        return ParallelMode.DISTRIBUTED if self.world_size > 1 else ParallelMode.NOT_PARALLEL

    @property
    def device(self) -> torch.device:
        """This rank's device. Opens the process group. Collective: every rank must call it."""
        return self._early_accelerator().device

    @property
    def n_gpu(self) -> int:
        """Devices of this process: 1, or 0 on a CPU. Collective: every rank must call it, like `device`."""
        return int(self.device.type != "cpu")

    @property
    def ddp_timeout_delta(self) -> timedelta:
        """How long a collective may wait for other ranks."""
        return timedelta(seconds=self.ddp_timeout)

    def get_process_log_level(self) -> int:
        """Look up this process's log level.

        Returns:
            A level of `logging`: of `log_level` on rank 0, of `log_level_replica` elsewhere.

        Example:
            >>> TrainingArguments(log_level="error").get_process_log_level() == logging.ERROR
            True
        """
        level = self.log_level if self.should_log else self.log_level_replica
        if level == "passive":
            return logging.getLogger("paceline").getEffectiveLevel()
        return int(getattr(logging, level.upper()))

    def main_process_first(self, local: bool = True, desc: str = "work") -> AbstractContextManager[None]:
        """Run the body on one rank before the others, which then find its files, for example a cached data set.

        Collective: every rank must call it.

        Args:
            local: Whether the first rank of each machine goes first; else only rank 0.
            desc: Ignored; transformers has it.

        Returns:
            A context manager.

        Example:
            >>> with TrainingArguments().main_process_first():
            ...     print("tokenize")
            tokenize
        """
        if self.world_size == 1:
            return nullcontext()
        accelerator = self._early_accelerator()
        if local:
            return accelerator.local_main_process_first()
        return accelerator.main_process_first()

    def _early_accelerator(self) -> Accelerator:
        """An Accelerator before there is a Trainer, whose own one will use the same process group."""
        opening = InitProcessGroupKwargs(backend=self.ddp_backend, timeout=self.ddp_timeout_delta)
        return Accelerator(cpu=True if self.use_cpu else None, kwargs_handlers=[opening])

    def _set_log_level(self) -> None:
        """Set the level of paceline's logger, unless it should stay as it is."""
        level = self.log_level if self.should_log else self.log_level_replica
        is_explicit = self.log_level != "passive" or (not self.should_log and level != "warning")
        if level != "passive" and is_explicit:
            logging.getLogger("paceline").setLevel(level.upper())


class _RefusesTransformers:
    """A field that transformers' Trainer reads before any other that differs here; it gets an error instead."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type[Any]) -> Any:
        if instance is None:
            return None
        if sys._getframe(1).f_globals.get("__name__") == "transformers.trainer":
            raise PrepareError(
                f"transformers' Trainer got paceline's {type(instance).__name__}",
                "It needs its own TrainingArguments, and would not use paceline",
                "Write from paceline import Trainer, which takes the same arguments",
            )
        return instance.__dict__[self._name]

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self._name] = value


# Set here, because in the class body it would be taken for the default of the field.
TrainingArguments.accelerator_config = _RefusesTransformers("accelerator_config")  # type: ignore[assignment]
# `help(TrainingArguments)` lists the fields; their meaning has one source.
TrainingArguments.__doc__ = f"{TrainingArguments.__doc__}\n    Fields, with their defaults:\n\n" + "".join(
    f"    {line}\n" for line in TrainingArguments.describe().splitlines()
)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return repr(value)
