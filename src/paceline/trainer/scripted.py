"""What scripts written for transformers' Trainer call around a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import NotBuiltError
from paceline.trainer import model_files as saving
from paceline.trainer import result_files as results
from paceline.trainer.evaluating import Evaluating

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

__all__ = ["Scripted"]


class Scripted(Evaluating):
    """Metrics printed and kept in files, facts about the model, and a clear no to what is not there."""

    # Results

    def metrics_format(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Metrics as people read them."""
        return results.format_metrics(metrics)

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Print metrics of `train`, `eval` or whatever they are of, on the main process."""
        if self.accelerator.is_main_process:
            print(results.as_text(split, metrics), flush=True)

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """Write `SPLIT_results.json` into `output_dir`, and add to `all_results.json` there."""
        if self.accelerator.is_main_process:
            results.write_results(self.args.output_dir, split, metrics, combined=combined)

    def save_state(self) -> None:
        """Write `trainer_state.json` into `output_dir`."""
        if self.accelerator.is_main_process:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            self.state.save_to_json(Path(self.args.output_dir) / saving.STATE_FILE)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,  # noqa: A002  # transformers' name
        tags: str | Sequence[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | Sequence[str] | None = None,
        dataset_tags: str | Sequence[str] | None = None,
        dataset: str | Sequence[str] | None = None,
        dataset_args: str | Sequence[str] | None = None,
    ) -> None:
        """Write `README.md` into `output_dir`: what the model was made from, its last evaluation, the arguments.

        Args:
            language: Of its texts.
            license: Under which it may be used.
            tags: Words by which it is found.
            model_name: Its name.
            finetuned_from: The model that it began as.
            tasks: What it is for.
            dataset_tags: Names of the data by which it is found.
            dataset: Names of the data for people.
            dataset_args: Which parts of the data.
        """
        if not self.accelerator.is_main_process:
            return
        said = {"language": language, "license": license, "model_name": model_name, "base_model": finetuned_from}
        listed = {"tags": tags, "tasks": tasks, "datasets": dataset_tags, "dataset": dataset}
        listed["dataset_args"] = dataset_args
        said |= {name: results.as_list(value) for name, value in listed.items()}  # type: ignore[misc]
        values = self.args.to_dict()
        text = results.model_card(said, {name: values[name] for name in self.args.origins()}, self.state)
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(text, encoding="utf-8")

    # Facts

    def get_num_trainable_parameters(self) -> int:
        """Numbers in the model that are trained; a rank's own part where it is sharded."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def get_learning_rates(self) -> list[float]:
        """The rate of each group of parameters; none before `train` or `create_optimizer`."""
        return [] if self.optimizer is None else [float(group["lr"]) for group in self.optimizer.param_groups]

    # For subclasses

    def compute_loss_context_manager(self) -> AbstractContextManager[None]:
        """For a `training_step` of one's own: the run's precision. Prepared models compute in it by themselves."""
        return self.accelerator.autocast()

    def autocast_smart_context_manager(self, cache_enabled: bool = True) -> AbstractContextManager[None]:
        """Older name of `compute_loss_context_manager`."""
        return self.compute_loss_context_manager()

    # What is not there

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Not there.

        Raises:
            NotBuiltError: Always.
        """
        raise NotBuiltError("hyperparameter_search", "Let the search build one Trainer for each trial")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Not there: nothing is uploaded.

        Raises:
            NotBuiltError: Always.
        """
        raise NotBuiltError("push_to_hub", "Call trainer.save_model(), and huggingface_hub on output_dir")
