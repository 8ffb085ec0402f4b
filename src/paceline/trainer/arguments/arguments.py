"""`TrainingArguments`: everything that a training run can be told, checked when it is made."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from paceline.errors import ConfigError, PrepareError, Problem, did_you_mean
from paceline.trainer.arguments import checks
from paceline.trainer.arguments.command_line import parse_arguments
from paceline.trainer.arguments.fields import AllFields
from paceline.trainer.arguments.parsing import fields_of, read_mapping, read_value
from paceline.trainer.arguments.process import Launched

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Self

__all__ = ["TrainingArguments"]

WHERE = "TrainingArguments(…)"

_NO_HUB = "paceline uploads nothing; use huggingface_hub on output_dir"
_SPACES = "leave it out, or set Trackio's own variables"
_LIGER = "apply liger_kernel to the model yourself, before it goes to the Trainer"
# Names that other versions have, with what to do instead.
_ABSENT = {
    **dict.fromkeys(("hub_model_id", "hub_token", "hub_strategy", "hub_private_repo"), _NO_HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _NO_HUB),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _SPACES),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), _LIGER),
    "adafactor": 'write optim="adafactor"',
    "debug": "leave it out: use `paceline launch --debug`, or torch.autograd.set_detect_anomaly",
    "dispatch_batches": "write it into accelerator_config",
    "enable_jit_checkpoint": "leave it out: SIGTERM always saves",
    "eval_use_gather_objects": "write eval_use_gather_object",
    "evaluation_strategy": "write eval_strategy",
    "fsdp_min_num_params": "write min_num_params into fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "write transformer_layer_cls_to_wrap into fsdp_config",
    "group_by_length": 'write train_sampling_strategy="group_by_length"',
    "include_inputs_for_metrics": 'write include_for_metrics=["inputs"]',
    "include_tokens_per_second": "leave it out: `paceline report` shows it",
    "jit_mode_eval": "leave it out: use torch_compile",
    "local_rank": "leave it out: the launcher says which rank this is",
    "log_on_each_node": "leave it out: log_level_replica says what other ranks may say",
    "logging_dir": "leave it out: logs go to output_dir",
    "no_cuda": "write use_cpu",
    "optim_target_modules": "leave it out: GaLore, LOMO and APOLLO are not there; give the Trainer an optimizer",
    "overwrite_output_dir": "leave it out: nothing is overwritten, and resuming is asked for in train()",
    "per_gpu_eval_batch_size": "write per_device_eval_batch_size",
    "per_gpu_train_batch_size": "write per_device_train_batch_size",
    "save_on_each_node": "leave it out: every rank writes its own part of a checkpoint",
    "save_safetensors": "leave it out: weights are always safetensors",
    "split_batches": "write it into accelerator_config",
    "torchdynamo": "write torch_compile_backend",
    "use_cache": "leave it out: set model.config.use_cache",
    "use_mps_device": "leave it out: an accelerator that is there is used",
}


@dataclass
class TrainingArguments(Launched, AllFields):
    """What to train, how long, how and where; every field is one of transformers' name and meaning, or says otherwise.

    All problems are reported at once. `TrainingArguments.describe()` lists the fields.

    Raises:
        ConfigError: Unknown names, values of the wrong type, values that contradict each other.
    """

    _origins: ClassVar[dict[str, str]] = {}
    ABSENT: ClassVar[dict[str, str]] = _ABSENT

    def __new__(cls, *args: Any, **values: Any) -> Self:
        """Refuse unknown names before the generated constructor would, with what was probably meant."""
        known = fields_of(cls)
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(_with_others(cls, unknown, values, WHERE, args))
        made = super().__new__(cls)
        # No field: it says nothing that a run could be told.
        made.__dict__["_origins"] = dict.fromkeys(values, WHERE)
        return made

    def __post_init__(self) -> None:
        problems: list[Problem] = []
        defaults = {made.name: _default(made) for made in dataclasses.fields(self)}
        for name, hint in fields_of(type(self)).items():
            try:
                setattr(self, name, read_value(hint, getattr(self, name)))
            except ValueError as error:
                problems.append(Problem(WHERE, name, str(error)))
                # So that contradictions between the others are found as well.
                setattr(self, name, defaults[name])
        problems += checks.find_problems(self)
        if problems:
            raise ConfigError(problems)
        checks.settle(self)

    # Where arguments come from

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **values: Any) -> Self:
        """Read a YAML or JSON file; `values` override it.

        Raises:
            ConfigError: The file cannot be read, or what is in it cannot work.
        """
        name = os.fspath(path)
        try:
            found = read_mapping(name)
        except ValueError as error:
            raise ConfigError([Problem(name, "", str(error))]) from error
        known = fields_of(cls)
        unknown = [key for key in found if key not in known]
        if unknown:
            raise ConfigError(_with_others(cls, unknown, {**found, **values}, name))
        made = cls(**{**found, **values})
        made.note_origins({key: name for key in found if key not in values})
        return made

    @classmethod
    def from_command_line(cls, argv: Sequence[str] | None = None) -> Self:
        """Read `--name value` flags, and before them a YAML or JSON file named first or by `--config`.

        Raises:
            ConfigError: Unknown flags, or values that cannot work.
        """
        (arguments,) = cls.parse(argv=argv)
        return arguments  # type: ignore[no-any-return]

    @classmethod
    def parse(cls, *others: type[Any], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Read the flags of this class and of other dataclasses, and return one object of each."""
        return parse_arguments((cls, *others), argv)

    @classmethod
    def describe(cls) -> str:
        """Every field with its default and what it does, one a line."""
        made = dataclasses.fields(cls)
        return "\n".join(f"{f.name} = {_default(f)!r}: {f.metadata.get('help', '')}" for f in made)

    def to_dict(self) -> dict[str, Any]:
        """The values, as JSON can hold them."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def to_sanitized_dict(self) -> dict[str, Any]:
        """The values as numbers and text only, as trackers want them."""
        kept = (bool, int, float, str)
        values = {**self.to_dict(), "train_batch_size": self.train_batch_size, "eval_batch_size": self.eval_batch_size}
        return {name: value if isinstance(value, kept) else str(value) for name, value in values.items()}

    def to_json_string(self) -> str:
        """The values as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def origins(self) -> dict[str, str]:
        """Where each value that is no default came from: a file, a flag, the script, or what other values say."""
        made, hints = dataclasses.fields(self), fields_of(type(self))
        changed = {f.name for f in made if getattr(self, f.name) != read_value(hints[f.name], _default(f))}
        return {name: self._origins.get(name, "other arguments") for name in sorted(changed | self._origins.keys())}

    def note_origins(self, origins: Mapping[str, str]) -> None:
        """Say of values where they came from."""
        self._origins.update(origins)

    # What follows from the fields

    @property
    def train_batch_size(self) -> int:
        """Samples in a micro-batch of one rank, as it is used."""
        return self.batch_plan(self.world_size)[0]

    @property
    def eval_batch_size(self) -> int:
        """Samples in an evaluation batch of one rank."""
        return self.per_device_eval_batch_size

    def batch_plan(self, ranks: int, most: int | None = None) -> tuple[int, int]:
        """The samples of a rank's micro-batch, and the micro-batches of an optimizer step.

        With `global_batch_size` the micro-batch is the largest that is no larger than
        `per_device_train_batch_size` and makes the global batch come out whole.

        Args:
            ranks: That share the global batch.
            most: Overrides `per_device_train_batch_size`; the optimizer step keeps its samples.

        Raises:
            ConfigError: The global batch cannot be shared out among so many ranks.
        """
        most = self.per_device_train_batch_size if most is None else most
        total = self.global_batch_size
        if total is None:
            share = self.per_device_train_batch_size * self.gradient_accumulation_steps
            if most == self.per_device_train_batch_size:
                return most, self.gradient_accumulation_steps
        elif total % ranks:
            what = f"{total} cannot be shared out among {ranks} ranks"
            raise ConfigError([Problem(WHERE, "global_batch_size", what, hint=f"choose a multiple of {ranks}")])
        else:
            share = total // ranks
        micro = next(size for size in range(min(most, share), 0, -1) if share % size == 0)
        return micro, share // micro

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps over which the learning rate rises."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        share = self.warmup_steps or self.warmup_ratio or 0.0
        return math.ceil(num_training_steps * share)

    def interval(self, name: str, total: int) -> int:
        """`logging_steps`, `eval_steps` or `save_steps` as a number of steps, where it may be a share of all."""
        value = getattr(self, name)
        if value is None:
            value = self.logging_steps
        return max(1, math.ceil(total * value)) if value < 1 else int(value)


class _OwnReaders:
    """A field that the Trainer of transformers reads before any other that differs here: it is told what it got."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, holder: Any, owner: type[Any]) -> Any:
        if holder is None:
            return None
        if sys._getframe(1).f_globals.get("__name__") == "transformers.trainer":
            raise PrepareError(
                f"The Trainer of transformers got paceline's {type(holder).__name__}",
                "It reads fields of its own class, and uses nothing of paceline",
                "Write from paceline import Trainer, which takes the same arguments",
            )
        return holder.__dict__[self._name]

    def __set__(self, holder: Any, value: Any) -> None:
        holder.__dict__[self._name] = value


# Set here: the dataclass has taken its default from the field of that name.
TrainingArguments.accelerator_config = _OwnReaders("accelerator_config")  # type: ignore[assignment]


def _with_others(
    cls: type[Any], unknown: Sequence[str], values: Mapping[str, Any], where: str, positional: Sequence[Any] = ()
) -> list[Problem]:
    """What is wrong with names that are unknown, and with the values of the others."""
    problems = [_unknown(cls, name, where) for name in unknown]
    try:
        cls(*positional, **{name: value for name, value in values.items() if name not in unknown})
    except ConfigError as error:
        problems += error.problems
    except TypeError:  # one without a default was left out
        pass
    return problems


def _unknown(cls: type[Any], name: str, where: str) -> Problem:
    hint = _ABSENT.get(name) or did_you_mean(name, fields_of(cls))
    return Problem(where, name, "unknown name", hint=hint)


def _default(made: dataclasses.Field[Any]) -> Any:
    return made.default if made.default_factory is dataclasses.MISSING else made.default_factory()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
