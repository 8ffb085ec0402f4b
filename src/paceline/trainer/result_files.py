"""Metrics as text and files, and the model card."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from paceline.trainer.arguments.arguments import TrainingArguments
    from paceline.trainer.state import TrainerState

__all__ = ["as_list", "as_text", "format_metrics", "model_card", "write_model_card", "write_results"]


def format_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Format metrics for people: times as hours, minutes and seconds, numbers with four decimals."""
    return {name: _readable(name, value) for name, value in metrics.items()}


def _readable(name: str, value: Any) -> Any:
    if "_runtime" in name:
        whole = int(value)
        return f"{timedelta(seconds=whole)}.{int((value - whole) * 100):02d}"
    if isinstance(value, float):
        return round(value, 4)
    return value


def as_text(split: str, metrics: Mapping[str, Any]) -> str:
    """Metrics as lines, sorted by name."""
    shown = {name: str(value) for name, value in sorted(format_metrics(metrics).items())}
    left = max(map(len, shown), default=0)
    right = max(map(len, shown.values()), default=0)
    lines = [f"  {name:<{left}} = {value:>{right}}" for name, value in shown.items()]
    return "\n".join([f"***** {split} metrics *****", *lines])


def write_results(folder: str | os.PathLike[str], split: str, metrics: Mapping[str, Any], *, combined: bool) -> None:
    """Write `SPLIT_results.json`, and merge it into `all_results.json` if `combined`."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    _write(target / f"{split}_results.json", metrics)
    if combined:
        path = target / "all_results.json"
        before = {}
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
        _write(path, {**before, **metrics})


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def as_list(value: str | Sequence[str] | None) -> list[str]:
    """A list of texts, from one, several, or none."""
    if isinstance(value, str):
        return [value]
    return list(value or ())


def model_card(properties: Mapping[str, Any], arguments: Mapping[str, Any], state: TrainerState) -> str:
    """A `README.md` for a model: how it was trained, with which arguments, and its last evaluation.

    Args:
        properties: The YAML head; values that are None or empty are left out.
        arguments: Names and values of arguments that are not defaults.
        state: The state at the end of the training.
    """
    head = [f"{name}: {json.dumps(value)}" for name, value in properties.items() if value not in (None, [])]
    title = properties.get("model_name") or "A model trained with paceline"
    evaluations = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
    metrics = format_metrics(evaluations[-1] if evaluations else {})
    rows = [f"| {name} | {value} |" for name, value in metrics.items()]
    table = ["", "## Evaluation", "", "| metric | value |", "|---|---|", *rows] if rows else []
    listed = [f"* `{name}`: {json.dumps(value)}" for name, value in arguments.items()]
    trained = f"{state.global_step} optimizer steps, {state.epoch:.2f} epochs."
    return "\n".join(["---", *head, "---", "", f"# {title}", "", trained, *table, "", "## Arguments", "", *listed, ""])


def write_model_card(args: TrainingArguments, state: TrainerState, properties: Mapping[str, Any]) -> None:
    """Write `README.md` into `output_dir`.

    Args:
        args: Those that are not defaults are listed.
        state: The state at the end of the training.
        properties: The YAML head of the page.
    """
    values = args.to_dict()
    text = model_card(properties, {name: values[name] for name in args.origins()}, state)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(text, encoding="utf-8")
