"""The finished configuration, where each value came from, and how both reach the workers."""

from __future__ import annotations

import json
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from paceline.config.schema.base import Section, settings_of
from paceline.config.schema.names import sections
from paceline.config.schema.run import RunConfig
from paceline.config.sources.origin import DEFAULT, Origin
from paceline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["Recording", "Resolved", "current_configuration", "use_configuration", "values_of"]


@dataclass(frozen=True, slots=True)
class Recording:
    """What a run records for `paceline verify-resume` and `paceline parity`.

    Attributes:
        folder: Each rank writes its notes here.
        stop_at: The run ends after this many optimizer steps.
        kill_at: The last rank kills itself after this many optimizer steps; None for never.
        parity: Also record gradient norms, learning rates and weights.
        plays: A run on one process takes the batches of this many ranks as one batch.
        keep_dropout: Leave dropout on; each rank draws its own mask.
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
        origins: Dotted YAML key to source; a key that is missing has its default.
        notes: One line for each value that was translated on the way.
        recording: What to record in a run that is checked; None for any other run.
    """

    config: RunConfig
    origins: Mapping[str, Origin]
    notes: tuple[str, ...] = ()
    recording: Recording | None = None

    def origin(self, key: str) -> Origin:
        """Return the source of a value.

        Args:
            key: The dotted YAML key, for example `fsdp_config.fsdp_offload_params`.

        Returns:
            The source; `DEFAULT` when no source set the value.
        """
        return self.origins.get(key, DEFAULT)

    def explain(self) -> tuple[tuple[str, Any, Origin], ...]:
        """List every effective value.

        Returns:
            Dotted key, value and source of each.
        """
        return tuple((key, value, self.origin(key)) for key, value in values_of(self.config))

    def to_json(self) -> str:
        """Write everything as one line of JSON.

        Returns:
            The text, which `from_json` reads.
        """
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
        """Read what `to_json` wrote.

        Args:
            text: The value of PACELINE_CONFIG.

        Returns:
            The configuration.

        Raises:
            ConfigError: The text is something else.
        """
        try:
            document = json.loads(text)
            config = _load(document["config"])
            origins = {str(key): Origin(**origin) for key, origin in document["origins"].items()}
            recorded = document.get("recording")
            recording = None
            if recorded is not None:
                recording = Recording(**recorded)
            return cls(config, origins, tuple(document["notes"]), recording)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{text[:60]!r} is not a resolved configuration"
            why = f"only the launcher sets this variable ({type(error).__name__}: {error})"
            hint = "unset it, and start workers with `paceline launch`"
            raise ConfigError([Problem("PACELINE_CONFIG", "", what, why, hint)]) from error


def values_of(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Yield each dotted key with its value; sections that are None yield nothing."""
    for setting in settings_of(RunConfig):
        value = getattr(config, setting.field)
        if isinstance(value, Section):
            for inner in settings_of(type(value)):
                yield f"{setting.key}.{inner.key}", getattr(value, inner.field)
        elif setting.field not in sections():
            yield setting.key, value


def values_at(config: RunConfig, keys: Iterable[str]) -> dict[str, Any]:
    """Return the values of these dotted keys, without those of sections that are None."""
    by_section: dict[str, set[str]] = {}
    for key in keys:
        section, _, name = key.rpartition(".")
        by_section.setdefault(section, set()).add(name)
    found: dict[str, Any] = {}
    for section, names in by_section.items():
        holder = getattr(config, section) if section else config
        if isinstance(holder, Section):
            prefix = f"{section}." if section else ""
            inner = ((setting.key, setting.field) for setting in settings_of(type(holder)) if setting.key in names)
            found.update({prefix + key: getattr(holder, field) for key, field in inner})
    return found


def _load(values: Mapping[str, Any]) -> RunConfig:
    models = sections()
    read: dict[str, Any] = {
        name: models[name][0](**value) if name in models and value is not None else value
        for name, value in values.items()
    }
    return RunConfig(**read)


_CURRENT: ContextVar[Resolved | None] = ContextVar("paceline_configuration", default=None)


@contextmanager
def use_configuration(resolved: Resolved) -> Iterator[None]:
    """Let each `Accelerator` built inside, in this thread, use a configuration as if launched with it.

    Args:
        resolved: The configuration; the environment is not read.
    """
    token = _CURRENT.set(resolved)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_configuration() -> Resolved | None:
    """Return the configuration of the enclosing `use_configuration`; None outside of one."""
    return _CURRENT.get()
