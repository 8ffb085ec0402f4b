"""The questionnaire: asks what matters on this machine, goes back on request, and writes the file at the end."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from paceline.cli.config.dialogue import BACK, Back, Choice, open_dialogue
from paceline.cli.config.machine import detect_machine
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
    """Ask, and write the answers; Ctrl-C writes nothing and exits with code 130."""
    file = target_file(os.environ, config_file)
    try:
        machine = detect_machine(os.environ)
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
    """Ask all questions that matter.

    Going back forgets the answer to the repeated question and those after it, since they may depend on it.

    Returns:
        The answers by dotted key; None when the user cancels.
    """
    answers: dict[str, object] = {}
    history: list[int] = []
    index = 0
    while True:
        index = _next(index, Situation(machine, answers))
        if index < len(QUESTIONS):
            answer = _ask(dialogue, QUESTIONS[index], Situation(machine, answers))
        else:
            answer = confirm(dialogue, Situation(machine, _given(answers)), file)
            if answer is not BACK:
                if answer:
                    return _given(answers)
                return None
        if answer is not BACK:
            answers[QUESTIONS[index].key] = answer
            history.append(index)
            index += 1
        elif history:
            index = history.pop()
            for question in QUESTIONS[index:]:
                answers.pop(question.key, None)
        else:
            index = 0


def _next(index: int, now: Situation) -> int:
    """Return the index of the next question that matters; one with a single possible answer does not."""
    while index < len(QUESTIONS):
        question = QUESTIONS[index]
        if question.matters(now) and len(question.choices(now)) != 1:
            return index
        index += 1
    return index


def _given(answers: dict[str, object]) -> dict[str, object]:
    """Return the answers without those that were left open."""
    return {key: value for key, value in answers.items() if value is not None and value != ()}


def _ask(dialogue: Dialogue, question: Question, now: Situation) -> object | Back:
    setting, suggested = question.setting, question.suggestion(now)
    choices = question.choices(now)
    if choices:
        default = 0
        if suggested in choices:
            default = choices.index(suggested)
        shown = [Choice(_name(value), _meaning(question, value), value) for value in choices]
        return dialogue.choose(setting.key, question.text, shown, default)

    def parse(text: str) -> object:
        if text == _name(suggested):
            return suggested
        return setting.shape.read(text, "text")

    def check(text: str) -> str:
        value = parse(text)
        if question.needed and not value:
            return question.needed
        return _explain(now.new_problems(question, value))

    typed = dialogue.write(setting.key, question.text, _name(suggested), check)
    if isinstance(typed, Back):
        return typed
    return parse(typed)


def _meaning(question: Question, value: object) -> str:
    """Return the meaning of a choice: that of the question, else that of the schema."""
    meanings = {**dict(question.setting.labels), **question.meanings}
    return meanings.get(_name(value)) or meanings.get(str(value), "")


def _name(value: object) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _explain(problems: Sequence[Problem]) -> str:
    return "; ".join(f"{p.what}; {p.why or p.hint}".strip("; ") for p in problems)


def confirm(dialogue: Dialogue, now: Situation, file: Path) -> object | Back:
    """Show what will be written, and ask whether to write it; from a pipe nothing is asked.

    Raises:
        ConfigError: The answers contradict each other, and come from a pipe.
    """
    problems = sorted(now.problems(now.answers), key=str)
    if not dialogue.shows_summary:
        if problems:
            raise ConfigError(problems, "nothing was written")
        return True
    click.echo(f"\n{_text(now.answers, now.machine)}\nThis goes to {file}.")
    if file.exists():
        click.echo(f"The file that is there now is kept as {file.name}.bak.")
    for problem in problems:
        click.echo(f"This cannot work: {problem}")
    good: tuple[Choice, ...] = ()
    if not problems:
        good = (Choice("write", "the file", True),)
    choices = (
        *good,
        Choice("back", "to the last question", BACK),
        Choice("cancel", "and leave everything as it is", False),
    )
    return dialogue.choose("file", "Write this?", choices, 0)


def _text(answers: Mapping[str, object], machine: Machine) -> str:
    header = (
        f"Written by `paceline config` for {machine}.",
        "Other settings have their defaults: `paceline config show --explain` lists every value and its source.",
    )
    return as_yaml(answers, header)
