"""All of Accelerate's surface, and what the stand-in makes of it: names, arguments, commands, keys, variables.

`python -m tests.compat.surface` writes the page `docs/accelerate-surface.md`. With `--record` it first writes
`surface.json` from the Accelerate that is installed: names of all modules, flags of all commands, keys of the
configuration file, environment variables. The tests compare with the record, and the record with an installed release.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import pkgutil
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.compat import signatures
from tests.compat.surface_notes import DIFFERENT, INSTEAD, INTERNAL, VALUES

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "data" / "compat" / "surface.json"
PAGE = ROOT / "docs" / "accelerate-surface.md"
TWIN = "paceline.compat.accelerate"
VERSION = "1.15.0"

PARSERS = {
    "config": ("commands.config.config", "config_command_parser"),
    "env": ("commands.env", "env_command_parser"),
    "estimate-memory": ("commands.estimate", "estimate_command_parser"),
    "launch": ("commands.launch", "launch_command_parser"),
    "merge-weights": ("commands.merge", "merge_command_parser"),
    "test": ("commands.test", "test_command_parser"),
    "to-fsdp2": ("commands.to_fsdp2", "to_fsdp2_command_parser"),
    "tpu-config": ("commands.tpu", "tpu_command_parser"),
}
_VARIABLE = re.compile(
    r"(ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG|XLA|KMP|MASTER|NCCL|MPI|PMI|OMPI|MV2|OMP|LOCAL)_[A-Z0-9_]+"
    r"|CUDA_VISIBLE_DEVICES|HF_HOME|RANK|WORLD_SIZE"
)
# Attributes of instances, where Accelerate's class has a property.
_OF_INSTANCES = {"step_was_skipped"}
_NO_VARIABLES = {"LOCAL_MACHINE", "LOCAL_STATE_DICT", "MEGATRON_LM"}


@dataclass(frozen=True)
class Row:
    """One line of the page."""

    name: str
    state: str
    text: str = ""


# The record


def record_of(package: str) -> dict[str, Any]:
    """The surface of an installed package with Accelerate's layout."""
    modules = {module: _module_surface(package, module) for module in _modules(package)}
    args = importlib.import_module(f"{package}.commands.config.config_args")
    flags = {command: _flags(package, *place) for command, place in PARSERS.items()}
    folder = Path(str(importlib.import_module(package).__file__)).parent
    return {
        "modules": {name: surface for name, surface in modules.items() if surface is not None},
        "flags": flags,
        "keys": {kind: [f.name for f in fields(getattr(args, kind))] for kind in ("ClusterConfig", "SageMakerConfig")},
        "variables": sorted(_variables(folder) | _of_flags(flags["launch"])),
    }


def _modules(package: str) -> list[str]:
    found = pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
    names = [module.name.removeprefix(f"{package}.") for module in found]
    return ["", *sorted(name for name in names if not name.startswith(("test_utils", "settings", "bridge")))]


def _module_surface(package: str, module: str) -> dict[str, Any] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return signatures.surface(package, module)
    except ModuleNotFoundError:  # utils.rich of the real package without rich
        return None


def _flags(package: str, module: str, function: str) -> dict[str, str]:
    parser: argparse.ArgumentParser = getattr(importlib.import_module(f"{package}.{module}"), function)()
    found = {}
    for action in parser._actions:
        name = next((each for each in action.option_strings if each.startswith("--")), action.dest)
        if name != "--help":
            found[name] = signatures.plain(action.default)
    return found


def _constants(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.rglob("*.py"):
        if "test_utils" not in file.parts:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            found |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return found


def _variables(folder: Path) -> set[str]:
    texts = _constants(folder)
    return {text for text in texts if _VARIABLE.fullmatch(text) and not text.endswith("_")} - _NO_VARIABLES


def _of_flags(flags: dict[str, str]) -> set[str]:
    """Variables that the launcher makes of its flags."""
    names = (flag.removeprefix("--").upper() for flag in flags)
    starts = {"FP8_": "ACCELERATE_", "MEGATRON_LM_": "", "PARALLELISM_CONFIG_": "", "DYNAMO_": "ACCELERATE_"}
    return {f"{add}{name}" for name in names for start, add in starts.items() if name.startswith(start)}


# What the stand-in makes of it


@cache
def recorded() -> dict[str, Any]:
    """What Accelerate has."""
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


def _load(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(signatures.full_name(TWIN, module))


def name_rows(module: str) -> Iterator[Row]:
    """A row for each public name of a module."""
    try:
        loaded = _load(module)
    except ModuleNotFoundError:
        loaded = None
    for name, expected in recorded()["modules"][module].items():
        full = f"{module}.{name}" if module else name
        yield _name_row(full, name, loaded, expected)


def _name_row(full: str, name: str, loaded: Any, expected: Any) -> Row:
    if not hasattr(loaded, name):
        return Row(full, "not supported", _instead(full))
    value = getattr(loaded, name)
    reason = getattr(value, "reason", None)
    if isinstance(reason, tuple):
        return Row(full, "not supported", reason[1])
    todo = getattr(value, "todo", None)
    if isinstance(value, type) and todo:
        return Row(full, "not supported", todo)
    note = DIFFERENT.get(full, "")
    how = _signature(expected, value) if expected is not None else ""
    text = "; ".join(part for part in (note, how) if part)
    return Row(full, "different" if text else "same", text)


def _signature(expected: dict[str, Any], value: Any) -> str:
    """Where parameters, methods, members or values differ, in words."""
    if isinstance(value, type) and issubclass(value, BaseException):
        return ""
    found = signatures.described(value)
    parts = []
    if "value" in expected:
        if expected["value"] != found.get("value") and not callable(value):
            parts.append(f"value {found.get('value')}")
        return "; ".join(parts)
    if expected.get("parameters") != found.get("parameters") and "parameters" in expected:
        parts.append(_arguments(expected["parameters"], found.get("parameters", "")))
    methods, ours = expected.get("methods", {}), found.get("methods", {})
    missing = sorted(set(methods) - set(ours) - set(dir(value)) - _OF_INSTANCES)
    if missing:
        parts.append(f"without {', '.join(missing)}")
    changed = sorted(n for n in methods if n in ours and methods[n] != ours[n] and _matters(methods[n], ours[n]))
    if changed:
        parts.append(f"other arguments in {', '.join(changed)}")
    members, own = expected.get("members", {}), found.get("members", {})
    if set(members) - set(own):
        parts.append(f"without {', '.join(sorted(set(members) - set(own)))}")
    return "; ".join(filter(None, parts))


def _matters(expected: Any, found: Any) -> bool:
    """Whether a program could tell: a property for a method, or parameters that are missing or renamed."""
    if "property" in (expected, found):
        return bool(expected != found)
    return bool(_arguments(expected, found))


def _arguments(expected: str, found: str) -> str:
    names, ours = (_parameter_names(text) for text in (expected, found))
    if any(name.startswith("*") for name in ours):
        return ""
    missing = [name for name in names if name not in ours and not name.startswith("*")]
    parts = [f"without the argument{'s' if len(missing) > 1 else ''} {', '.join(missing)}"] if missing else []
    by_position = _positional(expected)
    if not missing and _positional(found)[: len(by_position)] != by_position:
        parts.append("other order of arguments")
    if not missing and _defaults(expected) != {n: d for n, d in _defaults(found).items() if n in names}:
        other = [n for n, d in _defaults(expected).items() if _defaults(found).get(n) != d]
        parts += [f"other defaults: {', '.join(f'{n}={_defaults(found).get(n)}' for n in other)}"] if other else []
    return "; ".join(parts)


def _parameter_names(text: str) -> list[str]:
    return [part.partition("=")[0].strip() for part in text.split(", ") if part and part != "*"]


def _positional(text: str) -> list[str]:
    names = [part.partition("=")[0].strip() for part in text.split(", ") if part]
    first_keyword = next((i for i, name in enumerate(names) if name.startswith("*")), len(names))
    return names[:first_keyword]


def _defaults(text: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in text.split(", ") if "=" in part)
    return {name.strip(): default for name, _, default in pairs}


def _instead(name: str) -> str:
    for pattern, text in (*INSTEAD.items(), *INTERNAL.items()):
        if re.fullmatch(pattern, name):
            return text
    return ""


def flag_rows(command: str) -> Iterator[Row]:
    """A row for each flag and argument of a command."""
    ours = _flags(TWIN, *PARSERS[command])
    for flag, default in recorded()["flags"][command].items():
        name = flag if flag.startswith("--") else flag.upper()
        unsupported = _instead(f"{command} {flag}")
        if flag not in ours or unsupported:
            yield Row(name, "not supported", unsupported)
            continue
        note = DIFFERENT.get(f"{command} {flag}", "")
        if not note and ours[flag].lower() != default.strip("'").lower() != ours[flag].strip("'").lower():
            note = f"default {ours[flag]}, not {default}"
        yield Row(name, "different" if note else "same", note)


def key_rows() -> Iterator[Row]:
    """A row for each key of the configuration file."""
    from paceline.config.schema.names import sections, settings_by_key

    for key in recorded()["keys"]["ClusterConfig"]:
        yield _key_row(key, key in settings_by_key("") or key in sections() or key in VALUES)
    for section in sections():
        for flag in recorded()["flags"]["launch"]:
            setting = settings_by_key(section).get(flag.removeprefix("--"))
            if setting is not None and flag.startswith("--") and flag not in ("--env", "--vm"):
                yield _key_row(f"{section}.{flag.removeprefix('--')}", True)
    for key in recorded()["keys"]["SageMakerConfig"]:
        if key not in recorded()["keys"]["ClusterConfig"]:
            yield _key_row(f"{key} (SageMaker)", True)


def _key_row(key: str, is_known: bool) -> Row:
    unsupported = _instead(f"key {key}")
    if unsupported or not is_known:
        return Row(key, "not supported", unsupported)
    note = DIFFERENT.get(f"key {key}", "")
    return Row(key, "different" if note else "same", note)


def variable_rows() -> Iterator[Row]:
    """A row for each environment variable."""
    texts = _constants(ROOT / "src" / "paceline")
    starts = [text for text in texts if text.endswith("_") and text.isupper()]
    for name in recorded()["variables"]:
        rests = [name.removeprefix(start) for start in starts if name.startswith(start)]
        composed = any(rest in texts or rest.lower() in texts for rest in rests)
        unsupported = _instead(f"variable {name}")
        if unsupported or not (name in texts or composed):
            yield Row(name, "not supported", unsupported)
        else:
            note = DIFFERENT.get(f"variable {name}", "")
            yield Row(name, "different" if note else "same", note)


def tables() -> dict[str, list[Row]]:
    """All rows, by heading."""
    found: dict[str, list[Row]] = {}
    for module in recorded()["modules"]:
        found[f"`accelerate{'.' + module if module else ''}`"] = list(name_rows(module))
    for command in PARSERS:
        found[f"`accelerate {command}`"] = list(flag_rows(command))
    found["Keys of the configuration file"] = list(key_rows())
    found["Environment variables"] = list(variable_rows())
    return found


_HEAD = """\
# Accelerate's surface

<!-- Written from the code: python -m tests.compat.surface -->

Everything public of Accelerate {version}, and what it is under the switch (`paceline launch --as_accelerate`,
`python -m paceline.compat script.py`): the same, different (how), or not supported (what to do instead).

"Same" is what a test compares, and no more: a name can be imported; a function or class takes the same arguments in the
same order with the same defaults (ours may take more); a class has the same public methods, an enumeration the same
members, a constant the same value; a flag exists with the same default; a key of the configuration file is known; an
environment variable is named in the code. For what the packages `accelerate` and `accelerate.utils` pass on from other
modules, the rest stands with the module. Whether a name also behaves the same, this page cannot say: a difference in
behaviour stands here as "different" where it is known, [Migration](migration.md#from-accelerate) describes those that
matter to a program, and what is compared with Accelerate by running both is in `tests/compat`.

Names that are not supported can be imported where they are public, and using one is an error that says the same as this
page. "Inner part" marks helpers of Accelerate's own work that no documentation mentions.

[Migration](migration.md) says how to move a program over.
"""


def page() -> str:
    """Write the page in Markdown."""
    found = tables()
    total = Counter(row.state for rows in found.values() for row in rows)
    states = ("same", "different", "not supported")
    parts = [_HEAD.format(version=VERSION), "| part | same | different | not supported |\n|---|--:|--:|--:|"]
    for heading, rows in found.items():
        if rows:
            count = Counter(row.state for row in rows)
            parts.append(f"| {heading} | {' | '.join(str(count[state]) for state in states)} |")
    parts.append(f"| all | {' | '.join(str(total[state]) for state in states)} |")
    for heading, rows in found.items():
        if rows:
            parts += ["", f"## {heading}", ""]
            parts += list(_lines(rows))
    return "\n".join(parts) + "\n"


def _lines(rows: list[Row]) -> Iterator[str]:
    same = [f"`{row.name.rpartition('.')[2]}`" for row in rows if row.state == "same"]
    if same:
        yield f"Same: {', '.join(same)}."
    rest = [row for row in rows if row.state != "same"]
    if same and rest:
        yield ""
    if rest:
        yield "| name | | how, or instead |\n|---|---|---|"
        for row in rest:
            text = row.text.replace("|", "\\|").replace("\n", " ")
            yield f"| `{row.name.rpartition('.')[2] or row.name}` | {row.state} | {text} |"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the record from the installed Accelerate first")
    if parser.parse_args(arguments).record:
        RECORD.write_text(json.dumps(record_of("accelerate"), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        recorded.cache_clear()
    PAGE.write_text(page(), encoding="utf-8")
    print(Counter(row.state for rows in tables().values() for row in rows))
    unexplained = [row.name for rows in tables().values() for row in rows if row.state != "same" and not row.text]
    print("without a text:", unexplained)


if __name__ == "__main__":
    main(sys.argv[1:])
