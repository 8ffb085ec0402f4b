"""The questionnaire: it asks what matters here, lets people go back, and writes the file at the very end."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from paceline.cli.config.dialogue import BACK, Back, Choice, open_dialogue
from paceline.cli.config.machine import look_around
from paceline.cli.config.questions import QUESTIONS, Question, Situation
from paceline.cli.config.targets import target_file, write_file
from paceline.cli.interrupts import INTERRUPTED
from paceline.config.sources.writing import as_yaml
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from paceline.cli.config.dialogue import Dialogue
    from paceline.cli.config.machine import Machine
    from paceline.errors import Problem

__all__ = ["ask_and_write", "interview"]

_KEYS = "Arrow keys choose, Enter takes what is shown, Esc goes back, Ctrl-C leaves everything as it was.\n"


def ask_and_write(config_file: Path | None) -> None:
    """Ask, and write the answers; Ctrl-C ends it without a trace, with exit code 130."""
    file = target_file(os.environ, config_file)
    try:
        machine = look_around(os.environ)
        dialogue = open_dialogue(os.environ)
        click.echo(f"This machine: {machine}")
        if dialogue.shows_summary:
            click.echo(_KEYS)
        answers = interview(dialogue, machine, file)
        dialogue.finish()
    except KeyboardInterrupt:
        click.echo("\npaceline: interrupted; nothing was written", err=True)
        sys.exit(INTERRUPTED)
    if answers is None:
        click.echo("Nothing was written.")
        return
    write_file(file, _text(answers, machine), is_default=config_file is None)


def interview(dialogue: Dialogue, machine: Machine, file: Path) -> dict[str, object] | None:
    """Ask all that matters and return the answers by dotted key; None when people decide against them.

    Going back forgets the answer to the question that is asked again, and those after it, since they may
    depend on it.
    """
    answers: dict[str, object] = {}
    asked: list[int] = []
    index = 0
    while True:
        index = _next(index, Situation(machine, answers))
        if index < len(QUESTIONS):
            answer = _ask(dialogue, QUESTIONS[index], Situation(machine, answers))
        else:
            answer = _confirm(dialogue, Situation(machine, _said(answers)), file)
            if answer is not BACK:
                return _said(answers) if answer else None
        if answer is not BACK:
            answers[QUESTIONS[index].key] = answer
            asked.append(index)
            index += 1
        elif asked:
            index = asked.pop()
            for question in QUESTIONS[index:]:
                answers.pop(question.key, None)
        else:
            index = 0


def _next(index: int, now: Situation) -> int:
    """Find the next question that matters; one with a single possible answer does not."""
    while index < len(QUESTIONS):
        question = QUESTIONS[index]
        if question.matters(now) and len(question.choices(now)) != 1:
            return index
        index += 1
    return index


def _said(answers: dict[str, object]) -> dict[str, object]:
    """Leave out what people left open."""
    return {key: value for key, value in answers.items() if value is not None and value != ()}


def _ask(dialogue: Dialogue, question: Question, now: Situation) -> object | Back:
    setting, suggested = question.setting, question.suggestion(now)
    choices = question.choices(now)
    if choices:
        default = choices.index(suggested) if suggested in choices else 0
        shown = [Choice(_name(value), _meaning(question, value), value) for value in choices]
        return dialogue.choose(setting.key, question.text, shown, default)

    def meant(text: str) -> object:
        return suggested if text == _name(suggested) else setting.shape.read(text, "text")

    def wrong(text: str) -> str:
        value = meant(text)
        if question.needed and not value:
            return question.needed
        return _explain(now.new_problems(question, value))

    typed = dialogue.write(setting.key, question.text, _name(suggested), wrong)
    return typed if isinstance(typed, Back) else meant(typed)


def _meaning(question: Question, value: object) -> str:
    """What a choice means: in the question's words, else in the schema's."""
    meanings = {**dict(question.setting.labels), **question.meanings}
    return meanings.get(_name(value)) or meanings.get(str(value), "")


def _name(value: object) -> str:
    if value is None or value == ():
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _explain(problems: Sequence[Problem]) -> str:
    return "; ".join(f"{p.what}; {p.why or p.hint}".strip("; ") for p in problems)


def _confirm(dialogue: Dialogue, now: Situation, file: Path) -> object | Back:
    """Show what would be written, where somebody is there to look at it.

    Raises:
        ConfigError: The answers do not fit together, and nobody is there to go back.
    """
    problems = sorted(now.problems(now.answers), key=str)
    if not dialogue.shows_summary:
        if problems:
            raise ConfigError(problems)
        return True
    click.echo(f"\n{_text(now.answers, now.machine)}\nThis goes to {file}.")
    if file.exists():
        click.echo(f"The file that is there now is kept as {file.name}.bak.")
    for problem in problems:
        click.echo(f"This cannot work: {problem}")
    good = () if problems else (Choice("write", "the file", True),)
    choices = (
        *good,
        Choice("back", "to the last question", BACK),
        Choice("cancel", "and leave everything as it is", False),
    )
    return dialogue.choose("file", "Write this?", choices, 0)


def _text(answers: Mapping[str, object], machine: Machine) -> str:
    header = (
        f"Written by `paceline config` for {machine}.",
        "What is not here has its default: `paceline config show --explain` lists every value and its source.",
    )
    return as_yaml(answers, header)
