"""The public surface, frozen: what changes here changes what users have written.

The snapshots lie beside this file. When a change is meant, renew them and look at the difference:

    RENEW_SNAPSHOTS=1 python -m pytest tests/unit/test_surface.py
    git diff tests/unit/snapshots
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import paceline
from paceline import Accelerator
from paceline.cli.launch import command
from paceline.config import Section, options
from paceline.config.schema.names import sections, settings_by_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SNAPSHOTS = Path(__file__).with_name("snapshots")
RENEW = "RENEW_SNAPSHOTS"


def public_names() -> Iterator[str]:
    yield from paceline.__all__


def methods() -> list[str]:
    """The public methods and properties of the facade, inherited ones included."""
    return sorted(name for name in dir(Accelerator) if not name.startswith("_"))


def shown(owner: type, name: str) -> str:
    """A method with its parameters, or a property with its type."""
    member = inspect.getattr_static(owner, name)
    if not isinstance(member, property):
        return f"{name}{inspect.signature(member)}"
    assert member.fget is not None
    kind = inspect.signature(member.fget).return_annotation
    return f"{name}: {kind}{' (settable)' if member.fset else ''}"


def accelerator() -> Iterator[str]:
    yield f"Accelerator{inspect.signature(Accelerator.__init__)}"
    yield from (shown(Accelerator, name) for name in methods())
    made = Accelerator(cpu=True)
    yield from sorted(f"{name} (attribute)" for name in vars(made) if not name.startswith("_"))


def launch_flags() -> Iterator[str]:
    for option in sorted(options(), key=lambda option: option.flag):
        choices = f" {'|'.join(option.choices)}" if option.choices else ""
        yield f"--{option.flag} {option.kind}{choices} -> {option.key} = {option.default!r}"
    schema = {f"flag_{option.flag}" for option in options()}
    for parameter in command.params:
        if parameter.name not in schema:
            yield f"{' '.join(parameter.opts)} (of the command)"


def config_keys() -> Iterator[str]:
    """Every spelling of every key of the file."""
    for section in ("", *sections()):
        for spelling, setting in sorted(settings_by_key(section).items()):
            dotted = f"{section}.{spelling}" if section else spelling
            yield f"{dotted}: {setting.shape.allowed} = {setting.default!r}"


def plugins() -> Iterator[str]:
    """The classes that scripts build, with their arguments."""
    for name in paceline.__all__:
        cls = getattr(paceline, name)
        if isinstance(cls, type) and issubclass(cls, Section):
            for field, info in sorted(cls.model_fields.items()):
                yield f"{name}({field}={info.get_default(call_default_factory=True)!r})"


def training_arguments() -> Iterator[str]:
    """The fields of `TrainingArguments`."""
    for field in dataclasses.fields(paceline.TrainingArguments):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        yield f"{field.name}: {field.type} = {default!r}"


def trainer() -> Iterator[str]:
    """The public methods and properties of `Trainer`, and its constructor."""
    yield f"Trainer{inspect.signature(paceline.Trainer.__init__)}"
    yield from (shown(paceline.Trainer, name) for name in dir(paceline.Trainer) if not name.startswith("_"))


@pytest.mark.parametrize(
    "surface",
    [public_names, accelerator, launch_flags, config_keys, plugins, training_arguments, trainer],
    ids=lambda surface: surface.__name__,
)
def test_the_surface_is_what_it_was(surface: Callable[[], Iterator[str]]) -> None:
    lines = list(surface())
    file = SNAPSHOTS / f"{surface.__name__}.txt"
    text = "\n".join(lines) + "\n"
    if os.environ.get(RENEW):
        SNAPSHOTS.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    difference = "\n".join(
        difflib.unified_diff(before.splitlines(), text.splitlines(), file.name, "now", lineterm="", n=0)
    )
    assert text == before, (
        f"The public surface changed:\n{difference}\n\nIf that is meant, renew the snapshot and commit it:\n"
        f"    {RENEW}=1 python -m pytest tests/unit/test_surface.py"
    )


def test_every_public_name_has_a_home() -> None:
    assert set(paceline.__all__) == {*paceline._HOME, "__version__"}
    assert paceline.__all__ == sorted(paceline.__all__)
    assert dir(paceline) == paceline.__all__


@pytest.mark.parametrize("name", sorted(paceline._HOME))
def test_public_names_are_their_homes_own(name: str) -> None:
    assert getattr(paceline, name) is getattr(import_module(paceline._HOME[name]), name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'paceline' has no attribute 'Accelerater'"):
        _ = paceline.Accelerater


@pytest.mark.parametrize("name", methods())
def test_every_public_method_says_what_it_does(name: str) -> None:
    text = inspect.getdoc(getattr(Accelerator, name))
    assert text
    assert text.splitlines()[0].endswith("."), "the first line is one sentence"


def test_every_setting_says_what_it_does() -> None:
    assert all(option.description.endswith(".") for option in options())
