"""What a rank of `notebook_launcher` runs: it calls the function that was sent, and sends back what that returns."""

from __future__ import annotations

import linecache
import os
import pickle
import sys
from pathlib import Path

CALL = "call"


def result_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves what its function returned."""
    return folder / f"result_{rank}"


def results_in(folder: Path) -> list[tuple[int, Path]]:
    """Every rank that has left something, and where."""
    found = [path for path in folder.glob("result_*") if not path.suffix]
    return [(int(path.name.removeprefix("result_")), path) for path in found]


def _call(folder: Path) -> None:
    with (folder / CALL).open("rb") as file:
        head = pickle.load(file)
        sys.path[:] = [*head["path"], *(entry for entry in sys.path if entry not in head["path"])]
        # Tracebacks show the lines of cells, which are in no file.
        for name, lines in head["sources"].items():
            linecache.cache[name] = (sum(map(len, lines)), None, lines, name)
        call = pickle.load(file)
    function = call["function"]
    main = sys.modules["__main__"].__dict__
    for name, value in getattr(function, "__globals__", {}).items():
        main.setdefault(name, value)
    del sys.argv[1:]
    value = function(*call["arguments"])

    from paceline.launch.notebook.pickling import pack_value

    where = result_file(folder, int(os.environ["RANK"]))
    unfinished = where.with_suffix(".part")
    unfinished.write_bytes(pack_value(value))
    unfinished.rename(where)


if __name__ == "__main__":
    _call(Path(sys.argv[1]))
