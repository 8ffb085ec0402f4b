"""The page about Accelerate's surface is what the code says, and covers all that the real package has."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

from tests.compat.surface import PAGE, ROOT, TWIN, VERSION, page, recorded, tables

AGAIN = "python -m tests.compat.surface"


def installed() -> str:
    try:
        return version("accelerate")
    except PackageNotFoundError:
        return ""


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), f"the surface changed: {AGAIN}"


def test_every_difference_says_how_and_every_refusal_what_to_do() -> None:
    rows = [row for each in tables().values() for row in each]
    assert [row.name for row in rows if row.state != "same" and not row.text] == []
    assert len(rows) > 1000


def test_names_that_are_not_supported_raise_one_error_with_the_alternative() -> None:
    from paceline.compat.accelerate.settings.errors import UnsupportedError

    tried = 0
    for module, names in recorded()["modules"].items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = importlib.import_module(f"{TWIN}.{module}" if module else TWIN)
        for name in names:
            value: Any = getattr(loaded, name, None)
            if isinstance(getattr(value, "reason", None), tuple):
                with pytest.raises(UnsupportedError) as caught:
                    value()
                assert caught.value.why
                assert caught.value.todo
                tried += 1
    assert tried > 40


@pytest.mark.compat
@pytest.mark.skipif(installed() != VERSION, reason=f"pip install accelerate=={VERSION}")
def test_the_record_is_that_of_the_installed_package() -> None:
    program = "import json; from tests.compat.surface import record_of; print(json.dumps(record_of('accelerate')))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # A module that needs a package of its own is in the record or not.
    for record in (found["modules"], recorded()["modules"]):
        record.pop("utils.rich", None)
    assert found == recorded()
