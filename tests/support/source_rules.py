"""What the source must look like: simple functions, plain words, complete docstrings.

`python -m tests.support.source_rules [path ...]` lists every offence below the given paths; `tests/docs` asserts that
there are none.
"""

from __future__ import annotations

import ast
import re
import sys
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING

from radon.complexity import cc_visit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "paceline"
MAX_COMPLEXITY = 12
MAX_LINES = 60

# Words that only this project's authors understood, and what an engineer who knows PyTorch says instead.
RETIRED = {
    "adopt": "attach, rebind, transfer or import",
    "alone": "single_process",
    "around": "context",
    "asked": "requested",
    "elsewhere": "remote",
    "held": "saved or kept",
    "hurry": "is_blocking",
    "mine": "local",
    "ours": "local or paceline",
    "remat": "activation_checkpointing",
    "said": "explicit",
    "settle": "finalize",
    "shortage": "out_of_memory",
    "steady": "updated_by_step",
    "successor": "replacement",
    "surroundings": "context",
    "theirs": "checkpoint or remote",
    "together": "all_ranks",
    "told": "on_progress or notified",
    "unasked": "unrequested",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef
# Sections whose parameters, results and errors are a promise to users.
PUBLIC_MODULES = (
    "accelerator/accelerator.py",
    "trainer/trainer.py",
    "trainer/arguments/arguments.py",
    "trainer/callbacks/base.py",
    "tracking/base.py",
    "strategies/base.py",
    "strategies/protocols.py",
    "errors.py",
    "environment/logging.py",
    "environment/random_generators.py",
    "data/skipping.py",
    "launch/notebook/launchers.py",
)


def source_files(paths: list[Path] | None = None) -> Iterator[Path]:
    """All Python files below `paths`, by default those of the package."""
    for path in paths or [SOURCE]:
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def offences(path: Path) -> Iterator[str]:
    """What is wrong in a file, a line each: `path:line: what`."""
    tree = ast.parse(path.read_text())
    checks: list[Callable[[Path, ast.Module], Iterator[tuple[int, str]]]] = [complexity, density, retired_words]
    if any(path.match(f"*/paceline/{module}") for module in PUBLIC_MODULES):
        checks.append(incomplete_docstrings)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    for check in checks:
        for line, problem in check(path, tree):
            yield f"{shown}:{line}: {problem}"


def complexity(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Functions with too many paths or lines. Radon counts boolean operators and comprehensions as paths, too."""
    seen = set()
    for block in cc_visit(path.read_text()):
        functions = [*getattr(block, "methods", ()), *getattr(block, "closures", ()), block]
        for function in functions:
            if hasattr(function, "methods") or function.lineno in seen:
                continue
            seen.add(function.lineno)
            if function.complexity > MAX_COMPLEXITY:
                yield function.lineno, f"{function.name} has a cyclomatic complexity of {function.complexity}"
    for node in ast.walk(tree):
        if isinstance(node, Function):
            lines = node.end_lineno - node.body[_first_statement(node)].lineno + 1 if node.end_lineno else 0
            if lines > MAX_LINES:
                yield node.lineno, f"{node.name} has {lines} lines"


def _first_statement(function: Function) -> int:
    return 1 if ast.get_docstring(function) and len(function.body) > 1 else 0


def density(_path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Conditional expressions inside each other; assignments inside lambdas and comprehensions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp) and _contains(node, ast.IfExp):
            yield node.lineno, "conditional expressions inside each other"
        if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)) and _contains(
            node, ast.NamedExpr
        ):
            yield node.lineno, f"an assignment inside a {type(node).__name__}"


def _contains(node: ast.AST, kind: type[ast.AST]) -> bool:
    return any(isinstance(inner, kind) for inner in ast.walk(node) if inner is not node)


def retired_words(path: Path, _tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Identifiers that contain a retired word."""
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type != tokenize.NAME:
                continue
            for word in words_of(token.string):
                if word in RETIRED:
                    yield token.start[0], f"the name {token.string} contains {word!r}: say {RETIRED[word]}"


def words_of(name: str) -> list[str]:
    """The words of an identifier, in lower case: `DataLoaderShard` and `data_loader_shard` have the same three."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def incomplete_docstrings(_path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Public functions and methods whose docstring leaves out a parameter, the result or an error they raise."""
    for node in _public_functions(tree.body):
        doc = ast.get_docstring(node) or ""
        if not doc:
            yield node.lineno, f"{node.name} has no docstring"
            continue
        documented = set(re.findall(r"^\s+\**(\w+)(?: \([^)]*\))?:", _section(doc, "Args"), re.M))
        missing = [name for name in _parameters(node) if name not in documented]
        if missing:
            yield node.lineno, f"{node.name} does not document {', '.join(missing)}"
        if _returns_something(node) and not (_section(doc, "Returns") or _section(doc, "Yields")):
            yield node.lineno, f"{node.name} does not say what it returns"
        if _raises(node) and not _section(doc, "Raises"):
            yield node.lineno, f"{node.name} does not say what it raises"


def _public_functions(body: list[ast.stmt]) -> Iterator[Function]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _public_functions(node.body)
        elif isinstance(node, Function) and not node.name.startswith("_") and not _is_overload(node):
            yield node


def _is_overload(node: Function) -> bool:
    return any("overload" in ast.unparse(each) or ".setter" in ast.unparse(each) for each in node.decorator_list)


def _parameters(node: Function) -> list[str]:
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    every += [each for each in (arguments.vararg, arguments.kwarg) if each]
    return [each.arg for each in every if each.arg not in ("self", "cls") and not each.arg.startswith("_")]


def _returns_something(node: Function) -> bool:
    if node.returns is None or ast.unparse(node.returns) in ("None", "Never", "NoReturn", "Self"):
        return False
    return not any(
        "property" in ast.unparse(each) or "contextmanager" in ast.unparse(each) for each in node.decorator_list
    )


def _raises(node: Function) -> bool:
    return any(isinstance(inner, ast.Raise) and inner.exc is not None for inner in ast.walk(node))


def _section(doc: str, title: str) -> str:
    found = re.search(rf"^{title}:\n((?:[ \t]+.*\n?|\n)+)", doc, re.M)
    return found.group(1) if found else ""


if __name__ == "__main__":
    every = [line for path in source_files([Path(each).resolve() for each in sys.argv[1:]]) for line in offences(path)]
    print("\n".join(every))
    print(f"{len(every)} offences")
    sys.exit(bool(every))
