"""The two ways to ask: with arrow keys on a terminal, or line by line from a pipe."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Protocol

import click

from paceline.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from questionary import Question as Prompt

__all__ = ["BACK", "Back", "Choice", "Dialogue", "open_dialogue"]

_BACK_WORD: Final = "<"


class Back(Enum):
    """The answer that goes back to the previous question."""

    BACK = "back"


BACK: Final = Back.BACK


@dataclass(frozen=True, slots=True)
class Choice:
    """One possible answer: its name, its meaning, and its value."""

    name: str
    meaning: str
    value: object


class Dialogue(Protocol):
    """Asks one thing after another. Ctrl-C raises `KeyboardInterrupt` and leaves the terminal as it was."""

    shows_summary: bool

    def choose(self, key: str, text: str, choices: Sequence[Choice], default: int) -> object | Back:
        """Ask for one of several answers; returns its value."""
        ...

    def write(self, key: str, text: str, default: str, check: Callable[[str], str]) -> str | Back:
        """Ask for text. `check` says what is wrong with one, and nothing when it is fine."""
        ...

    def finish(self) -> None:
        """Check that no answer is left over."""
        ...


def open_dialogue(env: Mapping[str, str]) -> Dialogue:
    """Ask with arrow keys on a terminal that supports it, else line by line."""
    can_draw = sys.stdin.isatty() and sys.stdout.isatty() and env.get("TERM", "dumb") != "dumb"
    if can_draw:
        return _Terminal()
    return _Lines()


class _Terminal:
    """Arrow keys, through questionary."""

    shows_summary = True

    def choose(self, key: str, text: str, choices: Sequence[Choice], default: int) -> object | Back:
        import questionary

        width = max(len(choice.name) for choice in choices)
        shown = [
            questionary.Choice(f"{choice.name:<{width}}  {choice.meaning}".rstrip(), value=index)
            for index, choice in enumerate(choices)
        ]
        prompt = questionary.select(
            f"{key}: {text}", shown, default=shown[default], instruction=" ", erase_when_done=True
        )
        answer = self._ask(prompt, "left")
        if not isinstance(answer, int):
            return BACK
        chosen = choices[answer]
        self._record(key, chosen.name)
        return chosen.value

    def write(self, key: str, text: str, default: str, check: Callable[[str], str]) -> str | Back:
        import questionary

        # An empty line is the default, which stands there in grey until something is typed.
        prompt = questionary.text(
            f"{key}: {text}",
            validate=lambda typed: typed == _BACK_WORD or check(typed or default) or True,
            placeholder=[("ansibrightblack", default)],
            erase_when_done=True,
        )
        answer = self._ask(prompt, "up")
        if answer in (BACK, _BACK_WORD):
            return BACK
        self._record(key, answer or default)
        return str(answer or default)

    def finish(self) -> None:
        """Do nothing: a terminal has no answers left over."""

    def _ask(self, prompt: Prompt, key: str) -> Any:
        """Show a prompt in which Esc, or another key, goes back."""
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent, merge_key_bindings

        def go_back(event: KeyPressEvent) -> None:
            event.app.exit(result=BACK)

        bindings = KeyBindings()
        bindings.add("escape")(go_back)
        bindings.add(key)(go_back)
        app = prompt.application
        app.key_bindings = merge_key_bindings([*filter(None, [app.key_bindings]), bindings])
        app.ttimeoutlen = 0.1
        try:
            return prompt.unsafe_ask()
        except EOFError as error:
            raise KeyboardInterrupt from error

    def _record(self, key: str, answer: str) -> None:
        click.echo(f"  {key}: {answer}")


class _Lines:
    """One line for each answer; a wrong one ends the dialogue, since a pipe cannot correct it."""

    shows_summary = False

    def choose(self, key: str, text: str, choices: Sequence[Choice], default: int) -> object | Back:
        names = [choice.name for choice in choices]
        line = self._read(key, f"{text} ({', '.join(names)})", names[default])
        if line == _BACK_WORD:
            return BACK
        named = {choice.name.casefold(): choice.value for choice in choices}
        if line.casefold() not in named:
            raise _refusal(key, line, f"it must be one of {', '.join(names)}")
        return named[line.casefold()]

    def write(self, key: str, text: str, default: str, check: Callable[[str], str]) -> str | Back:
        line = self._read(key, text, default)
        if line == _BACK_WORD:
            return BACK
        wrong = check(line)
        if wrong:
            raise _refusal(key, line, wrong)
        return line

    def finish(self) -> None:
        left = sys.stdin.readline().strip()
        if left:
            raise UsageError(
                f"The line {left!r} answers no question",
                "All questions had been answered, so answers may have met other questions than intended",
                "Check the questions above, and remove that line; nothing was written",
            )

    def _read(self, key: str, text: str, default: str) -> str:
        click.echo(text)
        click.echo(f"  {key} [{default}]: ", nl=False)
        line = sys.stdin.readline()
        if not line:
            click.echo()
            raise UsageError(
                f"The input ended before the question for {key}",
                "An answer is one line, and an empty line takes the default",
                "Add the missing lines, or write a file without questions: paceline config default",
            )
        answer = line.strip() or default
        click.echo(answer)
        return answer


def _refusal(key: str, line: str, why: str) -> UsageError:
    return UsageError(
        f"The answer for {key} was {line!r}", why[:1].upper() + why[1:], "Correct that line; nothing was written"
    )
