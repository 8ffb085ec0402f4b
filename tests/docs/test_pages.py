"""What the pages say exists: links, paths, commands and flags; and examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import logging
import pkgutil
import re
import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

import paceline
from paceline.cli import command as program
from paceline.cli.launch import command as launch
from tests.support.examples import names_for

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "docs", ROOT / "examples")
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(page for f in FOLDERS for page in f.rglob("*.md"))])
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
COMMANDS = program.list_commands(click.Context(program))
MAKE = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def lines_of_commands(text: str) -> list[str]:
    """The lines of shell in fenced blocks, continued lines joined, comments and prompts removed."""
    blocks = re.findall(r"^ *```(?:bash|sh|shell|console)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines if line.strip() and not line.lstrip().startswith("#")]


def problems_of(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words.pop(0)
    if not words:
        return []
    program, rest = Path(words[0]).name, words[1:]
    if program == "make":
        return [
            f"no target {word}" for word in rest if word in MAKE or re.fullmatch("[a-z-]+", word) if word not in MAKE
        ]
    if program == "paceline" and rest and rest[0] not in COMMANDS and not rest[0].startswith("-"):
        return [f"no command {rest[0]}"]
    found = _wrong_flags(rest[1:]) if program == "paceline" and rest[:1] == ["launch"] else []
    return found + [f"no file {w}" for w in rest if w.startswith("examples/") and not (ROOT / w).exists()]


def _wrong_flags(words: list[str]) -> list[str]:
    context = click.Context(launch)
    parser = {name: p for p in launch.get_params(context) for name in (*p.opts, *p.secondary_opts)}
    found = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            break
        name, _, value = word.partition("=")
        option = parser.get("--" + name.lstrip("-").replace("-", "_") if name.startswith("--") else name)
        if option is None:
            found.append(f"no flag {name}")
            continue
        words_of_truth = {"true", "false", "yes", "no"}
        takes_value = isinstance(option, click.Option) and not option.is_flag and not value
        if takes_value and (option.metavar != "BOOL" or (rest and rest[0].lower() in words_of_truth)):
            rest[:1] = []
    return found


def test_the_check_of_commands_can_fail() -> None:
    assert problems_of("paceline launch --num-processes 2 --use_fsdp examples/vision.py --epochs 2") == []
    assert problems_of("OMP_NUM_THREADS=1 make check  # the gate") == []
    assert problems_of("paceline lunch x.py") == ["no command lunch"]
    assert problems_of("paceline launch --use_fdsp x.py") == ["no flag --use_fdsp"]
    assert problems_of("python examples/nothing.py") == ["no file examples/nothing.py"]
    assert problems_of("make nothing") == ["no target nothing"]
    assert lines_of_commands("```bash\n$ make \\\n  check\n# x\n```") == ["make    check"]


def test_there_are_pages() -> None:
    assert ROOT / "README.md" in PAGES


@PAGE
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text)
    local = [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
    assert not [target for target in local if not (page.parent / target).exists()]


@PAGE
def test_commands_name_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wrong = {line: found for line in lines_of_commands(text) if (found := problems_of(line))}
    assert not wrong


@PAGE
def test_paths_in_the_text_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = re.findall(r"`((?:src|tests|examples|docs|benchmarks)/[\w./-]+)`", text)
    assert not [path for path in paths if not (ROOT / path).exists()]


def modules() -> list[str]:
    found = pkgutil.walk_packages(paceline.__path__, "paceline.")
    return sorted({"paceline", *(module.name for module in found if not module.name.endswith("__main__"))})


@pytest.fixture
def kept_log_level() -> Iterator[None]:
    """Some examples set the level of paceline's messages."""
    logger = logging.getLogger("paceline")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("kept_log_level")
@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write checkpoints
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, example in enumerate(doctest.DocTestFinder(exclude_empty=True).find(module)):
            if example.examples:
                example.globs.update(names_for(name, tmp_path / str(number)))
                runner.run(example)
    assert runner.failures == 0


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_commands_at_the_top_of_examples_exist(example: Path) -> None:
    lines = re.findall(r"^    ((?:paceline|python|make) .*)$", example.read_text(encoding="utf-8"), re.MULTILINE)
    assert lines
    assert not [found for line in lines for found in problems_of(line)]


def paths_in_the_picture(text: str) -> list[str]:
    """The modules and folders in the picture of the package, which shows depth by indentation."""
    block = text.partition("```text\n")[2].partition("```")[0]
    paths: list[str] = []
    folders: list[str] = []
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        paths.append("".join(folders))
    return paths


def test_the_architecture_page_has_a_line_for_every_module() -> None:
    paths = paths_in_the_picture((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    assert not [path for path in paths if not (ROOT / path).exists()], "the page names what does not exist"
    # A folder without lines of its own is described as a whole.
    whole = tuple(path for path in paths if path.endswith("/") and sum(other.startswith(path) for other in paths) == 1)
    modules = [str(path.relative_to(ROOT)) for path in (ROOT / "src" / "paceline").rglob("*.py")]
    missing = [name for name in modules if name not in paths and not name.startswith(whole)]
    missing = [name for name in missing if not name.endswith("__init__.py")]
    assert not missing, "say in docs/architecture.md, in one line each, what a reader finds there"
