"""What scripts do with metrics at the end: print them, write them to files, describe the model in a page."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from paceline.trainer.state import TrainerState

__all__ = ["as_list", "as_text", "format_metrics", "model_card", "write_results"]


def format_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as people read them: times as hours, minutes and seconds, numbers with four decimals."""
    return {name: _readable(name, value) for name, value in metrics.items()}


def _readable(name: str, value: Any) -> Any:
    if "_runtime" in name:
        whole = int(value)
        return f"{timedelta(seconds=whole)}.{int((value - whole) * 100):02d}"
    return round(value, 4) if isinstance(value, float) else value


def as_text(split: str, metrics: Mapping[str, Any]) -> str:
    """Metrics as lines, sorted by their names."""
    shown = {name: str(value) for name, value in sorted(format_metrics(metrics).items())}
    left, right = (max(map(len, part), default=0) for part in (shown, shown.values()))
    return "\n".join([f"***** {split} metrics *****", *(f"  {n:<{left}} = {v:>{right}}" for n, v in shown.items())])


def write_results(folder: str | os.PathLike[str], split: str, metrics: Mapping[str, Any], *, combined: bool) -> None:
    """Write `SPLIT_results.json`, and add to `all_results.json`."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    _write(target / f"{split}_results.json", metrics)
    if combined:
        path = target / "all_results.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        _write(path, {**before, **metrics})


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def as_list(value: str | Sequence[str] | None) -> list[str]:
    """One text, several, or none."""
    return [value] if isinstance(value, str) else list(value or ())


def model_card(said: Mapping[str, Any], arguments: Mapping[str, Any], state: TrainerState) -> str:
    """A `README.md` for the folder of a model: what it was made from, with which arguments, and how it did.

    Args:
        said: What the script says of it; those that are None are left out.
        arguments: Names and values that are no defaults.
        state: Of the training.
    """
    head = [f"{name}: {json.dumps(value)}" for name, value in said.items() if value not in (None, [])]
    title = said.get("model_name") or "A model trained with paceline"
    evaluated = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
    rows = [f"| {name} | {value} |" for name, value in format_metrics(evaluated[-1] if evaluated else {}).items()]
    table = ["", "## Evaluation", "", "| metric | value |", "|---|---|", *rows] if rows else []
    listed = [f"* `{name}`: {json.dumps(value)}" for name, value in arguments.items()]
    trained = f"{state.global_step} optimizer steps, {state.epoch:.2f} passes over the data."
    return "\n".join(["---", *head, "---", "", f"# {title}", "", trained, *table, "", "## Arguments", "", *listed, ""])
