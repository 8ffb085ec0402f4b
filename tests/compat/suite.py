"""Runs a checkout's own tests of Accelerate through the switch and on the real package, and compares test by test.

python -m tests.compat.suite --suite CHECKOUT [--real | --switched] [--results FOLDER] [FILE...]

CHECKOUT holds `tests/` of Accelerate, which stays as it is. Without a side, both are run where the results of the real
one are not there yet. What passes there and not here must stand in `suite_exceptions.yaml`, with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
EXCEPTIONS = Path(__file__).with_name("suite_exceptions.yaml")
SIDES = ("real", "switched")

# The commands of either side: pip writes the same for the real package.
_COMMAND = """\
#!{python}
import sys
from accelerate.commands.{module} import main
sys.exit(main())
"""
_COMMANDS = {
    "accelerate": "accelerate_cli",
    "accelerate-config": "config",
    "accelerate-estimate-memory": "estimate",
    "accelerate-launch": "launch",
    "accelerate-merge-weights": "merge",
}


def run_file(side: str, suite: Path, file: str, seconds: float) -> dict[str, str]:
    """The outcome of each test of a file: passed, skipped, or the last line of what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        for name, module in _COMMANDS.items():
            command = Path(folder, name)
            command.write_text(_COMMAND.format(python=sys.executable, module=module))
            command.chmod(0o755)
        report = Path(folder, "report.xml")
        pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", f"--timeout={seconds:.0f}"]
        switch = ["-m", "paceline.compat"] if side == "switched" else []
        done = subprocess.run(
            [sys.executable, *switch, *pytest, file],
            cwd=suite,
            env=_environment(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if not report.exists():
            return {f"{file}::(no report)": f"exit status {done.returncode}: {done.stdout[-1500:]}"}
        return outcomes(report, file)


def _environment(folder: str) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": os.pathsep.join([folder, os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }


def outcomes(report: Path, file: str) -> dict[str, str]:
    """Read pytest's report. A test counts as passed if all its subtests did."""
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        owner = case.get("classname", "").rpartition(".")[2]
        name = f"{file}::{owner}::{case.get('name')}"
        outcome = "passed"
        for kind in ("skipped", "error", "failure"):
            found_kind = case.find(kind)
            if found_kind is not None:
                text = (found_kind.get("message") or "") + "\n" + (found_kind.text or "")
                outcome = "skipped" if kind == "skipped" else f"{kind}: {text.strip()[:4000]}"
        if found.get(name, "passed") == "passed":
            found[name] = outcome
    return found


def compare(real: dict[str, str], switched: dict[str, str], reasons: dict[str, str]) -> list[str]:
    """The lines of a report: each test that passes on the real package only, and what the exceptions say of it."""
    lines = []
    for name, outcome in real.items():
        ours = switched.get(name, "not collected")
        if outcome == "passed" and ours != "passed":
            shown = next((line for line in reversed(ours.splitlines()) if line.strip()), "")
            lines.append(f"{name}\n    {reasons.get(name) or 'NO REASON GIVEN: ' + shown[:200]}")
    needless = [name for name in reasons if switched.get(name) == "passed"]
    return [*lines, *(f"{name}\n    is an exception and passes" for name in needless)]


def exceptions() -> dict[str, str]:
    """The tests that pass on the real package only, with their reasons."""
    groups: list[dict[str, list[str] | str]] = yaml.safe_load(EXCEPTIONS.read_text())
    return {str(test): str(group["reason"]) for group in groups for test in group["tests"]}


def _totals(results: dict[str, dict[str, dict[str, str]]], file: str, reasons: dict[str, str]) -> str:
    real, switched = results["real"].get(file, {}), results["switched"].get(file, {})
    passing = [name for name, outcome in real.items() if outcome == "passed"]
    missed = [name for name in passing if switched.get(name) != "passed"]
    named = sum(name in reasons for name in missed)
    skipped = Counter(real.values())["skipped"]
    return f"{file:60} {len(passing):4} {len(passing) - len(missed):4} {named:4} {len(missed) - named:4} {skipped:4}"


def main(arguments: list[str]) -> int:
    """Run, write the results down, print the difference; 1 if a test fails here without a reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True, help="a checkout of Accelerate with its tests")
    parser.add_argument("--results", type=Path, help="where real.json and switched.json are kept")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for a test")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--real", action="store_const", const=("real",), dest="sides")
    choice.add_argument("--switched", action="store_const", const=("switched",), dest="sides")
    choice.add_argument("--report", action="store_const", const=(), dest="sides", help="run nothing")
    parser.add_argument("files", nargs="*", help="such as tests/test_optimizer.py; all by default")
    given = parser.parse_args(arguments)
    files = given.files or sorted(
        str(path.relative_to(given.suite)) for path in Path(given.suite, "tests").rglob("test_*.py")
    )
    folder = given.results or given.suite
    results = {side: _read(folder / f"{side}.json") for side in SIDES}
    sides = SIDES if given.sides is None else given.sides
    for side in sides:
        for file in files:
            if given.sides is None and side == "real" and file in results["real"]:
                continue
            print(f"{side}: {file}", flush=True)
            results[side][file] = run_file(side, given.suite, file, given.timeout)
            (folder / f"{side}.json").write_text(json.dumps(results[side], indent=1))
    return _report(results, files)


def _report(results: dict[str, dict[str, dict[str, str]]], files: list[str]) -> int:
    reasons = exceptions()
    print(f"{'':60} real ours named open skip")
    for file in files:
        print(_totals(results, file, reasons))
    lines = [
        line
        for file in files
        for line in compare(results["real"].get(file, {}), results["switched"].get(file, {}), reasons)
        if file in results["switched"]
    ]
    print("\n".join(lines))
    return int(any("NO REASON GIVEN" in line for line in lines))


def _read(path: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.exists() else {}
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
