"""The examples of the page on big models run, one after the other, and print what they say."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "big-models.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(tmp_path))
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    names: dict[str, object] = {"__name__": "examples"}
    for block in blocks:
        exec(compile(block.replace("from __future__", "# "), str(PAGE), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    said = re.findall(r"^(?:# (\{.*\})|print\(.*\)  # ([\w.]+))", "\n".join(blocks), re.MULTILINE)
    assert [line.split(":")[0] if "{" not in line else line for line in printed] == [one or two for one, two in said]
