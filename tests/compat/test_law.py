"""What the stand-in may use of the rest of paceline: public names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import paceline.compat

FILES = sorted(Path(paceline.compat.__path__[0]).rglob("*.py"))


def private_imports(tree: ast.Module) -> list[str]:
    """Private names and modules of paceline, outside of the stand-in, that a file imports."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [name for name in names if name.startswith("paceline.") and not name.startswith("paceline.compat")]
    return [name for name in found if any(part.startswith("_") for part in name.split("."))]


def test_the_check_can_fail() -> None:
    assert private_imports(ast.parse("from paceline.data.loader import _read, read")) == ["paceline.data.loader._read"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FILES[0].parent)))
def test_the_stand_in_imports_no_private_name(file: Path) -> None:
    assert private_imports(ast.parse(file.read_text())) == []
