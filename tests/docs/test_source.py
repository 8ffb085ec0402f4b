"""The source keeps its rules; the rules can fail; the glossary is in order."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.source_rules import ROOT, incomplete_docstrings, offences, source_files, words_of


@pytest.mark.parametrize("room", sorted({p.parent for p in source_files()}), ids=lambda room: room.name)
def test_the_source_keeps_its_rules(room: Path) -> None:
    """`python -m tests.support.source_rules` prints the same list."""
    assert not [line for path in sorted(room.glob("*.py")) for line in offences(path)]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("a = 1 if b else 2 if c else 3", "conditional expressions inside each other"),
        ("a = [c for b in d if (c := b)]", "an assignment inside a ListComp"),
        ("held_tensors = 1", "the name held_tensors contains 'held': say saved or kept"),
        (
            "def f(a):\n" + "".join(f"    if a == {n} and b: pass\n" for n in range(7)),
            "f has a cyclomatic complexity of 15",
        ),
        ("def f(a):\n" + "    a += 1\n" * 61, "f has 61 lines"),
    ],
)
def test_the_rules_can_fail(source: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert [line.split(": ", 1)[1] for line in offences(path)] == [problem]


def test_a_docstring_documents_parameters_results_and_errors() -> None:
    source = '''
def scale(tensor: Tensor, factor: float) -> Tensor:
    """Scale a tensor.

    Args:
        tensor: Any shape.
    """
    raise ValueError("no")
'''
    found = [problem for _, problem in incomplete_docstrings(Path("x.py"), ast.parse(source))]
    assert found == [
        "scale does not document factor",
        "scale does not say what it returns",
        "scale does not say what it raises",
    ]


def test_words_of_an_identifier() -> None:
    assert words_of("DDPModule_of2") == ["ddp", "module", "of"]
    assert words_of("_MAX_held") == ["max", "held"]


def test_the_glossary_has_each_term_once_in_alphabetical_order() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^\| ([^|]+?) \|", text, re.MULTILINE)[1:]
    assert len(terms) >= 40
    assert terms == sorted(set(terms), key=str.lower)
