"""Every error that paceline raises on purpose.

```text
PacelineError                      exit code 1
├── ConfigError                    exit code 2, holds every Problem found
├── UsageError                     exit code 2, a command was called wrongly
├── WorldError                     the launcher's variables contradict each other
├── DeviceError                    no such device, or it lacks what is needed
│   └── PrecisionError             the device does not support the requested precision
├── NotBuiltError                  a known choice that this release does not support
├── MissingExtraError              an optional package is not installed; names the pip command
├── PrepareError                   something passed to `prepare` cannot work
│   ├── UnknownBlockError          a block class the model does not have; lists the candidates
│   ├── ForeignOptimizerError      an optimizer holds parameters of no prepared model
│   └── UnassignedParametersError  trainable parameters that no optimizer updates
├── UnusedParametersError          parameters that took no part in the backward pass
├── SteppingError                  a step, clip or backward at the wrong moment
├── CollectiveError                ranks disagree about what they exchange
├── PlacementError                 a device map, size or weight that does not fit the model
├── OffloadedModelError            a model was moved while parts of it are in host memory or on disk
├── DataError                      a loader that cannot be divided among ranks, or is empty
├── StateError                     a training state that cannot be saved, or does not fit
│   └── CheckpointError            files that cannot be written, or hold another state
│       └── DamagedCheckpointError files that are missing, broken or unsafe to load
├── TrackingError                  a tracker that is missing, or was not opened
└── WorkerError                    a launched process failed; carries its exit code
```

A message has three parts: what was seen (with the value), why it cannot work, what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

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
    "OffloadedModelError",
    "PacelineError",
    "PlacementError",
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
"""Exit code of a run that saved its state and stopped on a signal (EX_TEMPFAIL: start it again)."""

HUNG: Final = 76
"""Exit code of a run that was stopped because ranks waited too long for others."""


class PacelineError(Exception):
    """The base class of all errors that paceline raises on purpose.

    Args:
        saw: What was seen, with the value.
        why: Why that cannot work.
        todo: What to do.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, saw: str, why: str = "", todo: str = "") -> None:
        self.saw = saw
        self.why = why
        self.todo = todo
        sentences = [_sentence(part) for part in (saw, why, todo) if part]
        # A part that is a list of lines ends in a newline.
        super().__init__("".join(text if text.endswith("\n") else f"{text} " for text in sentences).removesuffix(" "))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _sentence(text: str) -> str:
    if text.endswith((".", "!", "?", "\n", "`")):
        return text
    return f"{text}."


def _rebuild(cls: type[PacelineError], args: tuple[object, ...], fields: dict[str, object]) -> PacelineError:
    """Unpickle an error without its constructor, whose arguments differ between classes."""
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
        # A flag says which key it sets.
        is_named = self.where.startswith("--") and self.where[2:] == self.key.rpartition(".")[2]
        key = "" if is_named else self.key
        head = ": ".join(part for part in (self.where, key, self.what) if part)
        return "; ".join(part for part in (head, self.why, self.hint) if part)


class ConfigError(PacelineError):
    """The configuration has problems; all of them are in `problems`.

    Args:
        problems: All that was found.
        outcome: What a command has therefore not done, such as `nothing was started`; may be empty.
    """

    exit_code = 2

    def __init__(self, problems: Iterable[Problem], outcome: str = "") -> None:
        self.problems: Sequence[Problem] = tuple(problems)
        count = len(self.problems)
        head = "1 problem in the configuration" if count == 1 else f"{count} problems in the configuration"
        if outcome:
            head += f"; {outcome}"
        super().__init__("\n".join([head, *(f"  {p}" for p in self.problems), ""]))


class UsageError(PacelineError):
    """A command was called with arguments that cannot work."""

    exit_code = 2


class WorldError(PacelineError):
    """The variables of the launcher (RANK, WORLD_SIZE, …) are incomplete or contradict each other."""


class DeviceError(PacelineError):
    """There is no such device, or it lacks what is needed."""


class PrecisionError(DeviceError):
    """The device does not support the requested precision.

    Args:
        requested: The value of `mixed_precision`.
        device: The device, in words.
        supported: The precisions that it supports.
        why: Why it does not support the requested one, where more is known.
    """

    def __init__(self, requested: str, device: str, supported: Iterable[str], why: str = "") -> None:
        self.requested = requested
        self.supported = tuple(sorted(supported))
        super().__init__(
            f"mixed_precision={requested!r} was requested on {device}",
            why or f"that device supports {', '.join(self.supported)}",
            f"Choose one of {', '.join(self.supported)}",
        )


class NotBuiltError(PacelineError):
    """A known choice that this release does not support.

    Args:
        choice: The choice, as the user wrote it.
        todo: What to do instead.
    """

    exit_code = 2

    def __init__(self, choice: str, todo: str) -> None:
        self.choice = choice
        super().__init__(f"{choice} was chosen", "This release of paceline does not support it yet", todo)


class MissingExtraError(PacelineError, ImportError):
    """An optional package is not installed.

    Args:
        package: Its name.
        extra: The extra of paceline that installs it.
        purpose: What needs it.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(
            f"{purpose} needs the package {package!r}",
            "It is not installed",
            f"Run: pip install 'paceline[{extra}]'",
        )


class PrepareError(PacelineError):
    """Something passed to `prepare` cannot work."""


class UnknownBlockError(PrepareError):
    """A block class was named that the model does not contain.

    Args:
        requested: The class names that were given.
        candidates: The class names of the model's modules.
        found: The classes of the blocks that are found when none is named; empty if there are none.
        source: Where they were named: the place and the key; empty if unknown.
    """

    def __init__(
        self, requested: Iterable[str], candidates: Iterable[str], *, found: Iterable[str] = (), source: str = ""
    ) -> None:
        self.requested = tuple(requested)
        self.candidates = tuple(candidates)
        seen = f"No module of the model is of class {', '.join(map(repr, self.requested))}"
        if source:
            seen = f"{source}: {seen}"
        advice = f"{_close_names(self.requested, self.candidates)}The model's own classes are: "
        advice += ", ".join(self.candidates)
        if not self.candidates:
            advice = "The model contains no modules: remove the setting, and it is one sharding unit"
        blocks = ", ".join(found)
        if blocks:
            advice += f". Remove the setting, and paceline finds the blocks itself ({blocks})"
        super().__init__(seen, "FSDP makes a sharding unit of each module of the named classes", advice)


def _close_names(words: Iterable[str], candidates: Sequence[str]) -> str:
    """Return a hint with the closest candidates, `Did you mean A, B? `; may be empty."""
    from difflib import get_close_matches

    close = [match for word in words for match in get_close_matches(word, candidates, n=1, cutoff=0.6)]
    if close:
        return f"Did you mean {', '.join(close)}? "
    return ""


class ForeignOptimizerError(PrepareError):
    """An optimizer holds parameters that belong to no prepared model.

    Args:
        shapes: The shapes of those parameters.
        total: The number of all parameters of the optimizer.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], total: int) -> None:
        self.shapes = tuple(shapes)
        shown = ", ".join(map(str, self.shapes[:5]))
        super().__init__(
            f"{len(self.shapes)} of the optimizer's {total} parameters (shapes {shown}…) belong to no prepared model",
            "Its steps would not train the prepared model",
            "Build the optimizer from the parameters() of the model that you prepare",
        )


class UnassignedParametersError(PrepareError):
    """Trainable parameters that no optimizer updates.

    Args:
        names: The names of those parameters.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(
            f"{named(self.names)} {'is' if len(self.names) == 1 else 'are'} trainable but in no optimizer",
            "They would keep their initial values while the rest of the model trains",
            "Pass them to an optimizer, or freeze them with requires_grad_(False)",
        )


class UnusedParametersError(PacelineError):
    """Parameters that got no gradient in the backward pass of a model under DDP.

    Args:
        names: The names of those parameters.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(
            f"{len(self.names)} trainable parameters got no gradient: {named(self.names)}",
            "DDP waits for the gradient of every trainable parameter before it averages any of them",
            "Freeze them with requires_grad_(False), or pass "
            "DistributedDataParallelKwargs(find_unused_parameters=True), which walks the graph each step",
        )


class SteppingError(PacelineError):
    """A step, clip or backward at the wrong moment."""


class CollectiveError(PacelineError):
    """Ranks disagree about what they exchange."""


class PlacementError(PacelineError, ValueError):
    """A device map, a size or a weight that does not fit the model."""


class OffloadedModelError(PacelineError, RuntimeError):
    """A model was to be moved while parts of it are in host memory or on disk."""


class DataError(PacelineError):
    """A loader that cannot be divided among ranks, or that is empty."""


class StateError(PacelineError):
    """A training state that cannot be saved, or that does not fit where it is loaded."""


class CheckpointError(StateError):
    """A checkpoint that cannot be written, or that holds another state than the run."""


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint that are missing, broken or unsafe to load."""


class TrackingError(PacelineError):
    """A tracker that is missing or was not opened, or a run without a log."""


class WorkerError(PacelineError):
    """A launched process failed.

    Args:
        report: Which rank failed, and how.
        code: The exit code for the launcher; never 0.
    """

    def __init__(self, report: str, code: int) -> None:
        self.code = code
        super().__init__(report)


def first_line(error: BaseException, limit: int | None = None) -> str:
    """Return the first line of an exception's message: torch appends a C++ trace.

    Args:
        error: The exception.
        limit: The maximum number of characters; None for all.

    Returns:
        The line.
    """
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


Method = TypeVar("Method", bound="Callable[..., Any]")


def explains_keywords(instead: Mapping[str, str] | None = None) -> Callable[[Method], Method]:
    """Decorate a constructor: a keyword that it does not have is a `ConfigError` that says what to write.

    The signature stays as it is, for type checkers and for `inspect.signature`.

    Args:
        instead: What to write for names that are known from elsewhere; the closest parameter for any other.

    Returns:
        The decorator.

    Raises:
        ConfigError: From the decorated constructor, with every unknown keyword.
    """
    advice = instead or {}

    def decorate(init: Method) -> Method:
        code = init.__code__
        known = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        where = f"{init.__qualname__.partition('.')[0]}(…)"

        @wraps(init)
        def explained(self: object, *args: Any, **values: Any) -> None:
            unknown = [name for name in values if name not in known]
            if unknown:
                names = f"the names are {', '.join(known)}"
                hints = {name: advice.get(name) or did_you_mean(name, known) or names for name in unknown}
                raise ConfigError(Problem(where, name, "unknown argument", hint=hint) for name, hint in hints.items())
            init(self, *args, **values)

        return cast("Method", explained)

    return decorate


def counted(number: int, noun: str) -> str:
    """Write a number with its noun.

    Args:
        number: How many.
        noun: In the singular.

    Returns:
        Text such as `1 rank` or `2,000 batches`.
    """
    if number != 1:
        noun += "es" if noun.endswith(("ch", "s")) else "s"
    return f"{number:,} {noun}"


def named(names: Sequence[str], limit: int = 8) -> str:
    """Write out the first few names and count the rest.

    Args:
        names: The names.
        limit: How many to write out.

    Returns:
        Text such as `a, b and 3 more`.
    """
    head = ", ".join(names[:limit])
    if len(names) <= limit:
        return head
    return f"{head} and {len(names) - limit} more"


def named_ranks(numbers: Iterable[int], one: str = "", several: str = "") -> str:
    """Write [0, 2, 3, 4] as `ranks 0, 2-4`, followed by a verb.

    Args:
        numbers: The ranks, in any order.
        one: The verb for one rank.
        several: The verb for several ranks.

    Returns:
        Text such as `rank 7 is`.
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    is_one = len(runs) == 1 and runs[0][0] == runs[0][1]
    return f"{'rank' if is_one else 'ranks'} {text} {one if is_one else several}".rstrip()
