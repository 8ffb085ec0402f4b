"""The script of a rank of `notebook_launcher`: it calls the pickled function and saves the result."""

from __future__ import annotations

import linecache
import os
import pickle
import sys
from pathlib import Path

CALL = "call"


def result_file(folder: Path, rank: int) -> Path:
    """Return the file to which a rank saves its function's result."""
    return folder / f"result_{rank}"


def results_in(folder: Path) -> list[tuple[int, Path]]:
    """Return every rank that has saved a result, with its file."""
    paths = [path for path in folder.glob("result_*") if not path.suffix]
    return [(int(path.name.removeprefix("result_")), path) for path in paths]


def _call(folder: Path) -> None:
    with (folder / CALL).open("rb") as file:
        head = pickle.load(file)
        sys.path[:] = [*head["path"], *(entry for entry in sys.path if entry not in head["path"])]
        # So that tracebacks show the lines of cells, which are in no file.
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

    path = result_file(folder, int(os.environ["RANK"]))
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(pack_value(value))
    unfinished.rename(path)


if __name__ == "__main__":
    _call(Path(sys.argv[1]))
