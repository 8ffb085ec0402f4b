"""The finished configuration, and how it travels to the workers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from paceline.config.schema.base import Section, slots
from paceline.config.schema.names import sections
from paceline.config.schema.run import RunConfig
from paceline.config.sources.origin import DEFAULT, Origin
from paceline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True, slots=True)
class Recording:
    """What `paceline verify-resume` and `paceline parity` ask of a run.

    Attributes:
        folder: Where each rank writes its notes.
        stop_at: Optimizer steps after which the run ends.
        kill_at: Optimizer steps after which the last rank kills itself; None for never.
        parity: Whether gradient norms, learning rates and weights are noted too.
        plays: How many ranks' batches the run, which has one process, gets as one.
        keep_dropout: Whether dropout drops; what it drops is drawn by each rank for itself.
    """

    folder: str
    stop_at: int
    kill_at: int | None = None
    parity: bool = False
    plays: int = 1
    keep_dropout: bool = False


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration with the source of each value.

    Attributes:
        config: The values.
        origins: Dotted YAML key to source; keys that are absent have their defaults.
        notes: One line for each value that was translated on the way.
        recording: What a run that is checked writes down; None for any other.
    """

    config: RunConfig
    origins: Mapping[str, Origin]
    notes: tuple[str, ...] = ()
    recording: Recording | None = None

    def origin(self, key: str) -> Origin:
        """Return the source of a dotted key's value."""
        return self.origins.get(key, DEFAULT)

    def explain(self) -> tuple[tuple[str, Any, Origin], ...]:
        """List every effective value as dotted key, value and source."""
        return tuple((key, value, self.origin(key)) for key, value in values_of(self.config))

    def to_json(self) -> str:
        """Write everything as one line of JSON, which `from_json` reads back."""
        document: dict[str, Any] = {
            "config": self.config.model_dump(exclude_unset=True),
            "origins": {key: asdict(origin) for key, origin in self.origins.items()},
            "notes": self.notes,
        }
        if self.recording is not None:
            document["recording"] = asdict(self.recording)
        return json.dumps(document, separators=(",", ":"), default=str)

    @classmethod
    def from_json(cls, text: str) -> Resolved:
        """Read what `to_json` wrote; raise `ConfigError` when it is something else."""
        try:
            document = json.loads(text)
            config = _load(document["config"])
            origins = {str(key): Origin(**origin) for key, origin in document["origins"].items()}
            held = document.get("recording")
            recording = None if held is None else Recording(**held)
            return cls(config, origins, tuple(document["notes"]), recording)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{text[:60]!r} is not a resolved configuration"
            hint = "unset the variable, and start workers with `paceline launch`"
            why = f"only the launcher writes it ({type(error).__name__}: {error})"
            raise ConfigError([Problem("PACELINE_CONFIG", "", what, why, hint)]) from error


def values_of(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Yield each dotted key with its value; sections that are None yield nothing."""
    for slot in slots(RunConfig):
        value = getattr(config, slot.field)
        if isinstance(value, Section):
            for inner in slots(type(value)):
                yield f"{slot.key}.{inner.key}", getattr(value, inner.field)
        elif slot.field not in sections():
            yield slot.key, value


def _load(values: Mapping[str, Any]) -> RunConfig:
    models = sections()
    read: dict[str, Any] = {
        name: models[name][0](**value) if name in models and value is not None else value
        for name, value in values.items()
    }
    return RunConfig(**read)
