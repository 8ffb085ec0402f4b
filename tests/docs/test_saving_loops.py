"""The loops that save and resume, as the pages show them, run: with accumulation, to their last step, and again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from paceline.checkpoint import find_checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
SHORT = {"10_000": "40", "% 500": "% 15", "< 200": "< 40", "== 200": "== 40", "% 10 ": "% 15 "}


def blocks(page: str, title: str) -> list[str]:
    """The blocks of Python of a section."""
    text = (ROOT / page).read_text(encoding="utf-8")
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def of_readme() -> str:
    """The script of the README with the changes of its section on saving, where `...` stands for what it has."""
    [script], [changes] = blocks("README.md", "A training script"), blocks("README.md", "Save and resume")
    imports, rest = script.split("accelerator = Accelerator", 1)
    middle, loop = rest.split("\n", 1)[1].split("for x, y in loader:\n")
    body = "".join(re.findall(r"^        .*\n", loop, re.MULTILINE))
    changes = changes.replace("            ...  # as above\n", textwrap.indent(body, "    "))
    return imports + re.sub(r"^\.\.\.  # .*\n", lambda _: middle, changes, flags=re.MULTILINE)


def of_getting_started() -> str:
    """The script of the page for beginners with the changes of both sections, and an accumulation window of two."""
    page = "docs/getting_started.md"
    [plain], (start, loop) = blocks(page, "Start with an ordinary loop"), blocks(page, "Save and resume")
    head = plain.split("for epoch in")[0].replace("torch.manual_seed", f"{start}torch.manual_seed")
    whole = f"{head}model, optimizer, loader = accelerator.prepare(model, optimizer, loader)\n{loop}"
    body = re.search(r"^        loss = .*?zero_grad\(\)\n", whole, re.DOTALL | re.MULTILINE)
    assert body is not None
    window = "        with accelerator.accumulate(model):\n" + textwrap.indent(body[0], "    ")
    return whole.replace(body[0], window).replace("Accelerator(", "Accelerator(gradient_accumulation_steps=2, ")


def saved_steps(project: Path) -> list[int]:
    """The steps of the complete checkpoints of a project, newest first."""
    return [entry.checkpoint.manifest.step for entry in find_checkpoints(project) if entry.checkpoint is not None]


def run(script: str, folder: Path, stop: int) -> str:
    """What a run of the script writes, which ends at a step as if it had been stopped there."""
    said = "accelerator.load_state()  #"
    (folder / "train.py").write_text(
        script.replace(said, f"print('resumed', {said[:-3]} is not None, optimizer.num_steps)  #").replace(
            "            break\n", f"            break\n        if optimizer.num_steps == {stop}:\n            exit()\n"
        )
        + "print('ended at', optimizer.num_steps)\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(("script", "project"), [(of_readme, "a"), (of_getting_started, "first")])
def test_the_loop_saves_resumes_and_ends(script: Callable[[], str], project: str, tmp_path: Path) -> None:
    text = script()
    for long, short in SHORT.items():
        text = text.replace(long, short)
    assert "..." not in text
    first = run(text, tmp_path, 20)
    assert "resumed False 0\n" in first
    assert "ended" not in first
    assert saved_steps(tmp_path / "runs" / project) == [15]
    second = run(text, tmp_path, 1000)
    # The number of steps is read after the checkpoint was loaded.
    assert "resumed True 15\n" in second
    assert "ended at 40\n" in second
    assert saved_steps(tmp_path / "runs" / project) == [30, 15]
