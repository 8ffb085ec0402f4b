"""What a script's own text shows: whether it trains with Accelerate's Accelerator, or with a Trainer."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.launch.command import Command

__all__ = ["has_trainer", "imports_paceline", "trains_with_accelerate"]


def trains_with_accelerate(command: Command) -> bool:
    """Whether the script imports Accelerate's Accelerator or a Trainer of transformers or TRL, and not paceline.

    False says nothing: what it imports may do so. The worker notices that when an Accelerator is built.
    """
    return not imports_paceline(command) and any(map(_is_client, _names(command)))


def imports_paceline(command: Command) -> bool:
    """Whether the script itself imports paceline; what else it imports may do so, too."""
    return any(name.partition(".")[0] == "paceline" for name in _names(command))


def has_trainer(command: Command) -> bool:
    """Whether the script imports a Trainer, of paceline, transformers or TRL."""
    packages = ("paceline", "transformers", "trl")
    return any(name.partition(".")[0] in packages and name.endswith("Trainer") for name in _names(command))


def _names(command: Command) -> set[str]:
    """What the script imports, by dotted names; nothing where its text cannot be read."""
    path = Path(command.script)
    if command.kind != "script" or not path.is_file():
        return set()
    try:
        return set(_imported(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):  # a zip application, or an error that Python reports better
        return set()


def _imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names of what is imported, and of attributes of modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def _is_client(name: str) -> bool:
    package, _, rest = name.partition(".")
    last = rest.rpartition(".")[2]
    if package == "accelerate":
        return last == "Accelerator"
    return package in ("transformers", "trl") and last.endswith("Trainer")
