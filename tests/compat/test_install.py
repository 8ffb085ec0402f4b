"""The switch: what `import accelerate` finds, in this process and those that it starts, and how it is undone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from paceline.compat.install import VERSION

TWIN = str(Path("paceline", "compat", "accelerate"))
HIDDEN = """
import sys, importlib.metadata as metadata
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "accelerate":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
real = metadata.MetadataPathFinder.find_distributions
def without(context=metadata.DistributionFinder.Context()):
    return (found for found in real(context) if found.metadata["Name"] != "accelerate")
metadata.MetadataPathFinder.find_distributions = without
sys.meta_path.insert(0, Hide())
"""
SHOWN = """
import json
print(json.dumps(shown))
"""


def run_python(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )


def shown_by(code: str, head: str = "") -> dict[str, object]:
    """Run code in a fresh interpreter and return its variable `shown`."""
    done = run_python("-c", head + textwrap.dedent(code) + SHOWN)
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


needs_the_real_one = pytest.mark.skipif(
    run_python("-c", "import importlib.metadata as m; m.version('accelerate')").returncode != 0,
    reason="pip install accelerate",
)


@pytest.mark.parametrize("head", [pytest.param("", id="installed or not"), pytest.param(HIDDEN, id="hidden")])
def test_modules_and_metadata_are_those_of_the_stand_in(head: str) -> None:
    shown = shown_by(
        """
        import importlib.metadata, importlib.util
        from paceline.compat import install_as_accelerate, is_installed
        install_as_accelerate()
        install_as_accelerate()
        shown = {"spec": importlib.util.find_spec("accelerate").origin}
        import accelerate, accelerate.utils
        from accelerate.state import PartialState
        import paceline.compat.accelerate as own
        import paceline.compat.accelerate.state as own_state
        found = importlib.metadata.distribution("accelerate")
        shown |= {
            "installed": is_installed(),
            "file": accelerate.__file__,
            "same": [accelerate is own, accelerate.utils is own.utils, PartialState is own_state.PartialState],
            "name": own_state.__spec__.name,
            "versions": [importlib.metadata.version("accelerate"), found.version, accelerate.__version__],
            "requires": found.requires,
            "distributions": [d.version for d in importlib.metadata.distributions(name="accelerate")][0],
        }
        """,
        head,
    )
    assert TWIN in str(shown["spec"])
    assert TWIN in str(shown["file"])
    assert shown["installed"] is True
    assert shown["same"] == [True, True, True]
    assert shown["name"] == "paceline.compat.accelerate.state"
    assert shown["versions"] == [VERSION] * 3
    assert shown["distributions"] == VERSION
    assert shown["requires"] == ["paceline"]


def test_a_module_that_is_missing_says_that_the_switch_is_on() -> None:
    done = run_python(
        "-c", "import paceline.compat as c; c.install_as_accelerate(); import accelerate.utils.no_such_module"
    )
    assert "No module named 'accelerate.utils.no_such_module': paceline is installed as accelerate" in done.stderr
    assert "paceline.compat.accelerate.utils.no_such_module does not exist" in done.stderr


def test_without_the_real_package_the_undo_leaves_none() -> None:
    shown = shown_by(
        """
        import importlib.metadata, os
        from paceline.compat import install_as_accelerate, is_installed, uninstall_as_accelerate
        before = dict(os.environ), list(sys.path), list(sys.meta_path)
        uninstall_as_accelerate()
        install_as_accelerate()
        import accelerate.state
        uninstall_as_accelerate()
        shown = {"same": before == (dict(os.environ), sys.path, sys.meta_path), "on": is_installed()}
        shown["modules"] = [name for name in sys.modules if name.startswith("accelerate")]
        for name, find in {"module": __import__, "version": metadata.version}.items():
            try:
                find("accelerate")
            except ImportError as error:
                shown[name] = type(error).__name__
        """,
        HIDDEN,
    )
    assert shown == {
        "same": True,
        "on": False,
        "modules": [],
        "module": "ModuleNotFoundError",
        "version": "PackageNotFoundError",
    }


@needs_the_real_one
def test_the_undo_brings_the_modules_of_the_real_package_back() -> None:
    shown = shown_by(
        """
        import sys
        import accelerate, accelerate.utils.operations
        from paceline.compat import install_as_accelerate, uninstall_as_accelerate
        real = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "accelerate"}
        install_as_accelerate(ignore_earlier_imports=True)
        import accelerate.state
        between = sys.modules["accelerate"].__file__
        uninstall_as_accelerate()
        now = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "accelerate"}
        import accelerate.utils.operations as operations
        shown = {
            "between": between,
            "same": now.keys() == real.keys() and all(now[name] is real[name] for name in real),
            "file": operations.__file__,
        }
        """
    )
    assert TWIN in str(shown["between"])
    assert shown["same"] is True
    assert TWIN not in str(shown["file"])


@needs_the_real_one
def test_a_module_that_holds_the_real_one_is_named() -> None:
    done = run_python(
        "-c",
        "from accelerate import Accelerator\nfrom paceline.compat import install_as_accelerate\n"
        "install_as_accelerate()",
    )
    assert "UsageError: __main__ imported names of the real Accelerate before the switch." in done.stderr
    assert "Call install_as_accelerate() first" in done.stderr


SCRIPT = """
import importlib.metadata, multiprocessing, os, subprocess, sys

def from_a_child(pipe):
    import accelerate
    pipe.send([accelerate.__name__, importlib.metadata.version("accelerate")])

if __name__ == "__main__":
    import accelerate
    lines = [accelerate.__name__, " ".join(sys.argv)]
    for method in ("spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        process = context.Process(target=from_a_child, args=(theirs,))
        process.start()
        lines += ours.recv()
        process.join()
    code = "import accelerate, importlib.metadata as m; print(accelerate.__name__, m.version('accelerate'))"
    lines.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip())
    print(os.environ.get("RANK"), "|".join(lines), flush=True)
"""
NAME = "paceline.compat.accelerate"
SAID = f"|{NAME}|{VERSION}|{NAME}|{VERSION}|{NAME} {VERSION}"


@pytest.mark.parametrize("options", [["script.py"], ["--", "script.py"], ["-m", "script"]], ids=" ".join)
def test_a_script_is_run_under_the_switch(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run_python("-m", "paceline.compat", *options, "--lr", "1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert line.startswith(f"None {NAME}|")
    assert line.endswith(f"script.py --lr 1{SAID}")


def test_usage_and_a_script_that_does_not_exist(tmp_path: Path) -> None:
    assert run_python("-m", "paceline.compat", "--help").stdout.startswith("Usage: python -m paceline.compat")
    assert run_python("-m", "paceline.compat").returncode == 2
    done = run_python("-m", "paceline.compat", "no_such.py", folder=tmp_path)
    assert done.returncode == 2
    assert "There is no script 'no_such.py'" in done.stderr
    done = run_python("-m", "paceline.compat", "-m", folder=tmp_path)
    assert "Nothing follows -m" in done.stderr


def test_the_exit_code_and_the_traceback_are_those_of_the_script(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise ValueError('boom')\n")
    done = run_python("-m", "paceline.compat", "fails.py", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: boom"
    assert "paceline" not in done.stderr


@pytest.mark.parametrize("source", ["flag", "file", pytest.param("environment", marks=pytest.mark.slow)])
def test_the_launcher_hands_the_switch_to_its_ranks(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "run.yaml").write_text(
        f"num_processes: 2\nuse_cpu: true\nas_accelerate: {str(source == 'file').lower()}\n"
    )
    flags = ["--as-accelerate"] if source == "flag" else []
    if source == "environment":
        (tmp_path / "run.yaml").write_text("num_processes: 2\nuse_cpu: true\n")
        monkeypatch.setenv("PACELINE_AS_ACCELERATE", "true")
    done = run_python(
        "-m", "paceline", "launch", "--config_file", "run.yaml", *flags, "script.py", "x", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line)
    assert [line.partition(" ")[0] for line in lines] == ["0", "1"]
    assert all(f"{NAME}|" in line and line.endswith(f"script.py x{SAID}") for line in lines)


def test_a_variable_that_nobody_acts_on_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_AS_ACCELERATE", "true")
    (tmp_path / "script.py").write_text(
        "from paceline import Accelerator\nprint(Accelerator(cpu=True).num_processes)\n"
    )
    plain = run_python("script.py", folder=tmp_path)
    assert plain.returncode == 1
    assert "PACELINE_AS_ACCELERATE: as_accelerate: true has no effect here" in plain.stderr
    assert "python -m paceline.compat SCRIPT" in plain.stderr
    switched = run_python("-m", "paceline.compat", "script.py", folder=tmp_path)
    assert (switched.returncode, switched.stdout.strip()) == (0, "1"), switched.stderr


def test_the_plan_and_config_show_tell_the_switch(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("")
    (tmp_path / "run.yaml").write_text("num_processes: 1\nas_accelerate: true\n")
    plan = run_python(
        "-m", "paceline", "launch", "--config_file", "run.yaml", "--dry-run", "script.py", folder=tmp_path
    )
    assert '"as_accelerate":true' in plan.stdout
    show = run_python("-m", "paceline", "config", "show", "--config_file", "run.yaml", folder=tmp_path)
    assert any("as_accelerate" in line and "true" in line.lower() for line in show.stdout.splitlines()), show.stdout
    (tmp_path / "run.yaml").write_text("as_accelerate: perhaps\n")
    wrong = run_python("-m", "paceline", "config", "check", "run.yaml", folder=tmp_path)
    assert "as_accelerate: the text 'perhaps' is not allowed" in wrong.stdout + wrong.stderr


def test_a_python_without_paceline_says_what_pythonpath_does(tmp_path: Path) -> None:
    entry = Path(sys.modules["paceline.compat.install"].__file__ or "").with_name("path_entry")
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import accelerate"],
        env={**os.environ, "PYTHONPATH": str(entry)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "PYTHONPATH says that accelerate is paceline here" in done.stderr


TEST_HELPERS = """
from paceline.compat import install_as_accelerate
install_as_accelerate()
import importlib
"""


@needs_the_real_one
def test_helpers_for_tests_are_the_real_ones_on_this_accelerate() -> None:
    code = (
        TEST_HELPERS
        + """
helpers = importlib.import_module("accelerate.test_utils.testing")
state = importlib.import_module("paceline.compat.accelerate.state")
script = helpers.path_in_accelerate_package("test_utils", "scripts", "test_ops.py")
shown = {
    "file": helpers.__file__,
    "state": helpers.AcceleratorState is state.AcceleratorState,
    "script": script.exists(),
    "command": str(helpers.path_in_accelerate_package("commands", "launch.py")),
}
"""
    )
    shown = shown_by(code)
    assert TWIN not in str(shown["file"])
    assert str(shown["file"]).endswith(str(Path("accelerate", "test_utils", "testing.py")))
    assert (shown["state"], shown["script"]) == (True, True)
    assert TWIN in str(shown["command"])


def test_without_the_real_package_there_are_no_helpers_for_tests(tmp_path: Path) -> None:
    code = (
        TEST_HELPERS
        + """
import importlib.machinery as machinery
find = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name == "accelerate" else find(name, path, target)
)
try:
    importlib.import_module("accelerate.test_utils")
except ModuleNotFoundError as error:
    shown = {"text": str(error), "name": error.name}
"""
    )
    shown = shown_by(code)
    assert shown["name"] == "accelerate.test_utils"
    assert "no helpers for tests of its own" in str(shown["text"])
