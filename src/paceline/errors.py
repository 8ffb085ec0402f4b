"""Every error that paceline raises on purpose.

```text
PacelineError                      exit code 1
├── ConfigError                    exit code 2, holds every Problem found
├── UsageError                     exit code 2, a command was called wrongly
├── WorldError                     the launcher's variables contradict each other
├── DeviceError                    no such device, or it cannot do what was asked
│   └── PrecisionError             the device does not support the asked precision
├── NotBuiltError                  a known choice that this release does not carry out
├── MissingExtraError              an optional package is not installed; names the pip command
├── PrepareError                   something handed to `prepare` cannot work
│   ├── UnknownBlockError          a block class the model does not have; lists the candidates
│   ├── ForeignOptimizerError      an optimizer holds parameters of no prepared model
│   └── UnassignedParametersError  trainable parameters that no optimizer updates
├── UnusedParametersError          parameters that took no part in the backward pass
├── SteppingError                  a step, clip or backward at the wrong moment
├── CollectiveError                ranks disagree about what they exchange
├── DataError                      a loader that cannot be shared out, or yields nothing
├── StateError                     a training state that cannot be taken, or does not fit
│   └── CheckpointError            files that cannot be written, or hold something else
│       └── DamagedCheckpointError files that are missing, broken or not to be trusted
├── TrackingError                  a tracker that is not there, or was not opened
└── WorkerError                    a launched process failed; carries its exit code
```

A message has three sentences: what we saw (with the value), why it cannot work, what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "CheckpointError",
    "CollectiveError",
    "ConfigError",
    "DamagedCheckpointError",
    "DataError",
    "DeviceError",
    "ForeignOptimizerError",
    "MissingExtraError",
    "NotBuiltError",
    "PacelineError",
    "PrecisionError",
    "PrepareError",
    "Problem",
    "StateError",
    "SteppingError",
    "TrackingError",
    "UnassignedParametersError",
    "UnknownBlockError",
    "UnusedParametersError",
    "UsageError",
    "WorkerError",
    "WorldError",
]


PREEMPTED: Final = 75
"""Exit code of a run that saved its state and ended because it was asked to (EX_TEMPFAIL: try again)."""

HUNG: Final = 76
"""Exit code of a run that was ended because ranks waited for others that did not come."""


class PacelineError(Exception):
    """The root of all errors that paceline raises on purpose."""

    exit_code: ClassVar[int] = 1

    def __init__(self, saw: str, why: str = "", todo: str = "") -> None:
        self.saw = saw
        self.why = why
        self.todo = todo
        super().__init__(" ".join(_sentence(part) for part in (saw, why, todo) if part))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", "\n", "`")) else f"{text}."


def _rebuild(cls: type[PacelineError], args: tuple[object, ...], fields: dict[str, object]) -> PacelineError:
    """Unpickle an error without calling its constructor, whose arguments differ from class to class."""
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the configuration.

    Attributes:
        where: The source: `config.yaml:12`, `--zero_stage`, `PACELINE_DEBUG`, `Accelerator(…)`.
        key: The dotted key, for example `fsdp_config.fsdp_offload_params`.
        what: What was seen.
        why: Why that cannot work; may be empty.
        hint: What to do, for example a "did you mean"; may be empty.
    """

    where: str
    key: str
    what: str
    why: str = ""
    hint: str = ""

    def __str__(self) -> str:
        head = ": ".join(part for part in (self.where, self.key, self.what) if part)
        return "; ".join(part for part in (head, self.why, self.hint) if part)


class ConfigError(PacelineError):
    """The configuration has problems; all of them are in `problems`."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: Sequence[Problem] = tuple(problems)
        count = len(self.problems)
        head = "1 problem in the configuration" if count == 1 else f"{count} problems in the configuration"
        super().__init__("\n".join([f"{head}; nothing was started", *(f"  {p}" for p in self.problems), ""]))


class UsageError(PacelineError):
    """A command was called with arguments that cannot work."""

    exit_code = 2


class WorldError(PacelineError):
    """The variables that say which rank this is are incomplete or contradict each other."""


class DeviceError(PacelineError):
    """There is no such device, or it cannot do what was asked of it."""


class PrecisionError(DeviceError):
    """The device does not support the precision that was asked for."""

    def __init__(self, asked: str, device: str, supported: Iterable[str], why: str = "") -> None:
        self.asked = asked
        self.supported = tuple(sorted(supported))
        super().__init__(
            f"mixed_precision={asked!r} was asked for on {device}",
            why or f"that device supports {', '.join(self.supported)}",
            f"Choose one of {', '.join(self.supported)}",
        )


class NotBuiltError(PacelineError):
    """A choice that paceline knows and this release does not carry out."""

    exit_code = 2

    def __init__(self, choice: str, todo: str) -> None:
        self.choice = choice
        super().__init__(f"{choice} was chosen", "This release of paceline does not carry it out yet", todo)


class MissingExtraError(PacelineError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(
            f"{purpose} needs the package {package!r}",
            "It is not installed",
            f"Run: pip install 'paceline[{extra}]'",
        )


class PrepareError(PacelineError):
    """Something handed to `prepare` cannot work."""


class UnknownBlockError(PrepareError):
    """A block class was named that the model does not contain."""

    def __init__(self, asked: Iterable[str], candidates: Iterable[str]) -> None:
        self.asked = tuple(asked)
        self.candidates = tuple(candidates)
        super().__init__(
            f"No module of the model is of class {', '.join(map(repr, self.asked))}",
            "Sharding units are made of the classes that you name",
            f"{_close_names(self.asked, self.candidates)}The model's own classes are: {', '.join(self.candidates)}",
        )


def _close_names(words: Iterable[str], candidates: Sequence[str]) -> str:
    """Name the candidates that look most like some words: `Did you mean A, B? `; may be empty."""
    from difflib import get_close_matches

    close = [match for word in words for match in get_close_matches(word, candidates, n=1, cutoff=0.6)]
    return f"Did you mean {', '.join(close)}? " if close else ""


class ForeignOptimizerError(PrepareError):
    """An optimizer holds parameters that belong to no prepared model."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], total: int) -> None:
        self.shapes = tuple(shapes)
        shown = ", ".join(map(str, self.shapes[:5]))
        super().__init__(
            f"{len(self.shapes)} of the optimizer's {total} parameters (shapes {shown}…) belong to no prepared model",
            "Stepping it would not train what you prepared",
            "Build the optimizer from model.parameters() of the model that you prepare",
        )


class UnassignedParametersError(PrepareError):
    """Trainable parameters that no optimizer updates."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(
            f"{named(self.names)} {'is' if len(self.names) == 1 else 'are'} trainable but in no optimizer",
            "They would keep their first values while everything around them learns",
            "Give them to an optimizer, or freeze them with requires_grad_(False)",
        )


class UnusedParametersError(PacelineError):
    """Parameters that took no part in the backward pass of a model under DDP."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(
            f"{len(self.names)} trainable parameters got no gradient: {named(self.names)}",
            "DDP waits for the gradient of every trainable parameter before it averages any of them",
            "Freeze them with requires_grad_(False), or pass "
            "DistributedDataParallelKwargs(find_unused_parameters=True), which walks the graph each step",
        )


class SteppingError(PacelineError):
    """A step, clip or backward came at a moment when it cannot be right."""


class CollectiveError(PacelineError):
    """Ranks disagree about what they exchange."""


class DataError(PacelineError):
    """A loader that cannot be shared out, or that yields nothing."""


class StateError(PacelineError):
    """A training state that cannot be taken, or that does not fit where it is loaded."""


class CheckpointError(StateError):
    """A checkpoint that cannot be written, or that holds something else than what is to be loaded."""


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint that are missing, broken or not to be trusted."""


class TrackingError(PacelineError):
    """A tracker that is not there, was not opened, or finds nothing to show."""


class WorkerError(PacelineError):
    """A launched process failed.

    Attributes:
        code: The exit code that the launcher should end with; never 0.
    """

    def __init__(self, report: str, code: int) -> None:
        self.code = code
        super().__init__(report)


def first_line(error: BaseException, limit: int | None = None) -> str:
    """What an exception says in its first line: torch puts a trace of C++ behind it. At most `limit` letters."""
    return str(error).partition("\n")[0][:limit]


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return a hint such as `did you mean num_processes?`.

    Args:
        word: The unknown name.
        candidates: The names that exist; upper and lower case do not matter.

    Returns:
        The hint with the closest candidate; empty when none is close.
    """
    from difflib import get_close_matches

    folded = {candidate.casefold(): candidate for candidate in candidates}
    close = get_close_matches(word.casefold(), folded, n=1, cutoff=0.6)
    return f"did you mean {folded[close[0]]}?" if close else ""


def named(names: Sequence[str], limit: int = 8) -> str:
    """Write out the first few names and count the rest."""
    head = ", ".join(names[:limit])
    return head if len(names) <= limit else f"{head} and {len(names) - limit} more"


def named_ranks(numbers: Iterable[int], one: str = "", several: str = "") -> str:
    """Write [0, 2, 3, 4] as `ranks 0, 2-4`, and after it the verb as it goes with one rank or with several."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    is_one = len(runs) == 1 and runs[0][0] == runs[0][1]
    return f"{'rank' if is_one else 'ranks'} {text} {one if is_one else several}".rstrip()
