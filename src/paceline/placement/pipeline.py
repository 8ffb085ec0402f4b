"""A pipeline over ranks for inference: each has one stage of a model, and micro-batches pass through all of them.

torch.distributed.pipelining traces the model, cuts it, and sends what goes from one stage to the next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from paceline.collectives import Group, SoloGroup, TorchGroup, nested
from paceline.collectives.operations import broadcast
from paceline.errors import PlacementError, counted, did_you_mean, named
from paceline.placement.sizes import class_names

__all__ = ["Pipeline", "balanced_split_points", "pipeline_model"]


class Pipeline:
    """A model in stages, one for each rank of a group. `pipeline_model` makes it.

    Rank 0 reads the arguments of a call, and the last rank returns the output. A batch may have any number of rows, of
    the example's shape and dtypes: it passes in several rounds, or is filled up with copies of its last row, which the
    output is without. An output of one tensor is that tensor, one of several is a flat tuple of them.

    Attributes:
        split_points: The names of the modules that the second and every later stage begin with.
        schedule: torch's schedule with this rank's stage; None on one rank, where the model itself is called.
    """

    def __init__(
        self,
        model: nn.Module,
        example: tuple[tuple[Any, ...], dict[str, Any]],
        split_points: Sequence[str],
        chunks: int,
        group: Group,
        gather_output: bool,
    ) -> None:
        self.split_points = list(split_points)
        self._model_forward = model.forward
        self._form = _form(example)
        self._rows_at_once = _rows(example) * chunks
        self._group = group
        self._last_rank = group.size - 1
        self._is_gathered = gather_output
        self.schedule: Any = _schedule(model, example, split_points, chunks, group)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output on the last rank, with `gather_output` on all. Collective: every rank must call it.

        Raises:
            PlacementError: On every rank: the arguments of rank 0 do not have the form of the example.
        """
        with torch.no_grad():
            if self.schedule is None:
                return self._model_forward(*args, **kwargs)
            total = self._agree_on_rows((args, kwargs))
            rounds = range(0, total, self._rows_at_once)
            outputs = [self._pass((args, kwargs), begin, min(total - begin, self._rows_at_once)) for begin in rounds]
            output = nested.concatenate(outputs) if self._group.rank == self._last_rank else None
            return self._shared(output) if self._is_gathered else output

    def _agree_on_rows(self, inputs: Any) -> int:
        """The rows of rank 0's batch; an error on every rank, before any of them waits, if they cannot pass."""
        answer: int | str = 0
        if self._group.rank == 0:
            answer = self._difference(inputs) or _rows(inputs)
        answer = self._group.broadcast_object(answer)
        if isinstance(answer, str):
            raise PlacementError(
                f"The pipeline got {answer}",
                "Its stages were traced with the example",
                "Pass inputs of that form, or make the pipeline with such an example",
            )
        return answer

    def _difference(self, inputs: Any) -> str:
        form = _form(inputs)
        for name in [*self._form, *form]:
            if form.get(name) != self._form.get(name):
                return f"{form.get(name, 'no input')} for {name}; the example has {self._form.get(name, 'none')}"
        counts = {tensor.shape[0] for tensor in nested.tensors(inputs)}
        return "" if len(counts) == 1 and 0 not in counts else f"inputs of {named([*map(str, sorted(counts))])} rows"

    def _pass(self, inputs: Any, begin: int, rows: int) -> Any:
        """Send some rows through all stages; on the last rank return their output."""
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if self._group.rank == 0:
            part = nested.slice_tensors(inputs, slice(begin, begin + rows))
            filled = nested.map_tensors(self._filled, part)
            args, kwargs = nested.send_to_device(filled, self._group.device)
        output = self.schedule.step(*args, **kwargs)
        return nested.slice_tensors(output, slice(rows))

    def _filled(self, tensor: torch.Tensor) -> torch.Tensor:
        missing = self._rows_at_once - tensor.shape[0]
        return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) if missing else tensor

    def _shared(self, output: Any) -> Any:
        """The last rank's output on every rank."""
        is_source = self._group.rank == self._last_rank
        shapes = nested.map_tensors(lambda tensor: tensor.to("meta"), output) if is_source else None
        shapes = self._group.broadcast_object(shapes, self._last_rank)
        if not is_source:
            output = nested.map_tensors(lambda tensor: torch.empty_like(tensor, device=self._group.device), shapes)
        return broadcast(self._group, output, self._last_rank)


def pipeline_model(
    model: nn.Module,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    group: Group | None = None,
    split_points: str | Sequence[str] = "auto",
    no_split_module_classes: str | Collection[str] | None = None,
    chunks: int | None = None,
    gather_output: bool = False,
) -> Pipeline:
    """Divide a model into one stage for each rank, for inference. Collective: every rank must call it.

    The model is traced on the host, with the mode (`eval`) and the constants that it has now; each rank's device gets
    the weights of its own stage.

    Args:
        model: On the host, the same on all ranks.
        example_args: The arguments of one micro-batch.
        example_kwargs: Its keyword arguments.
        group: The ranks, and this rank's device; by default all ranks, each on its current accelerator if the process
            group exchanges tensors of that, else on the host.
        split_points: Names of the modules that later stages begin with; "auto" divides the bytes evenly.
        no_split_module_classes: Classes of modules that "auto" does not split.
        chunks: How many micro-batches are on their way at once; by default one for each stage.
        gather_output: Return the output on every rank.

    Raises:
        PlacementError: Another number of stages than ranks, an unknown module, or an example without rows.
    """
    group = group or _all_ranks()
    if split_points == "auto":
        split_points = balanced_split_points(model, group.size, no_split_module_classes)
    points = [split_points] if isinstance(split_points, str) else list(split_points)
    _check_split_points(model, points, group.size)
    example = (tuple(example_args), dict(example_kwargs or {}))
    return Pipeline(model, example, points, chunks or group.size, group, gather_output)


def _all_ranks() -> Group:
    if not (dist.is_available() and dist.is_initialized()):
        return SoloGroup()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    backends = dict(entry.split(":") for entry in dist.get_backend_config().split(","))
    # Gloo exchanges an accelerator's tensors in collectives, and not from one rank to the next.
    if accelerator is None or backends.get(accelerator.type, "gloo") == "gloo":
        return TorchGroup()
    return TorchGroup(torch.device(accelerator.type, torch.accelerator.current_device_index()))


def balanced_split_points(
    model: nn.Module, stages: int, no_split_module_classes: str | Collection[str] | None = None
) -> list[str]:
    """Return the modules before which to split a model so that its stages have about the same number of bytes.

    Modules are taken in the order of their definition. Repeated blocks stay whole where there are enough of them.

    Args:
        model: The model.
        stages: How many.
        no_split_module_classes: Classes of modules that stay whole.

    Raises:
        PlacementError: It has too few modules.
    """
    choices = list(_blocks(model))
    if len(choices) < stages:
        choices = list(_smallest_parts(model, class_names(no_split_module_classes)))
    if len(choices) < stages:
        raise PlacementError(
            f"{type(model).__name__} cannot be divided into {stages} stages",
            f"It has {counted(len(choices), 'module')} that can begin one",
            "Use fewer ranks, name split_points, or let more classes be split",
        )
    before, total = _bytes_before(model)
    points = [0]
    for stage in range(1, stages):
        # Each later stage needs a module, too.
        usable = range(points[-1] + 1, len(choices) - stages + stage + 1)
        share = total * stage / stages
        points.append(min(usable, key=lambda index: abs(before[choices[index]] - share)))
    return [choices[index] for index in points[1:]]


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """The entries of the outermost lists of modules."""
    for name, child in module.named_children():
        if isinstance(module, nn.ModuleList):
            yield prefix + name
        else:
            yield from _blocks(child, f"{prefix}{name}.")


def _smallest_parts(module: nn.Module, whole: Collection[str], prefix: str = "") -> Iterator[str]:
    """The modules that have no others, or stay whole."""
    for name, child in module.named_children():
        if type(child).__name__ in whole or next(child.children(), None) is None:
            yield prefix + name
        else:
            yield from _smallest_parts(child, whole, f"{prefix}{name}.")


def _bytes_before(model: nn.Module) -> tuple[dict[str, int], int]:
    """The bytes that are defined before each module, and all of them; what is tied counts where it is first."""
    before: dict[str, int] = {}
    seen: set[torch.Tensor] = set()
    total = 0
    for name, module in model.named_modules():
        before[name] = total
        own = {*module.parameters(recurse=False), *module.buffers(recurse=False)} - seen
        seen |= own
        total += sum(tensor.nbytes for tensor in own)
    return before, total


def _check_split_points(model: nn.Module, points: Sequence[str], stages: int) -> None:
    if len(points) != stages - 1:
        raise PlacementError(
            f"split_points has {counted(len(points), 'name')}, and there are {counted(stages, 'rank')}",
            "Each rank has one stage, and each stage but the first begins at one of the names",
            f"Name {stages - 1}, or leave it at 'auto'",
        )
    modules = dict(model.named_modules())
    for name in points:
        if name not in modules:
            hint = did_you_mean(name, modules)
            raise PlacementError(f"split_points has {name!r}", "The model has no such module", hint)


def _form(inputs: Any) -> dict[str, str]:
    """What the inputs of a call must have in common with the example: all but the number of rows."""
    args, kwargs = inputs
    named_inputs = {**{f"argument {index}": value for index, value in enumerate(args)}, **kwargs}
    return {nested.path_text(path[1:], str(path[0])): _describe(leaf) for path, leaf in nested.leaves(named_inputs)}


def _describe(leaf: Any) -> str:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    rows = ["rows", *map(str, leaf.shape[1:])] if leaf.dim() else []
    return f"a tensor of {leaf.dtype} [{', '.join(rows)}]"


def _rows(inputs: Any) -> int:
    return nested.find_batch_size(inputs)


def _schedule(
    model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]], points: Sequence[str], chunks: int, group: Group
) -> Any:
    """Build the stage of this rank on its device, and torch's schedule for it."""
    if group.size == 1:
        return None
    from torch.distributed.pipelining import ScheduleGPipe, SplitPoint, pipeline

    host = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    args, kwargs = nested.send_to_device(example, host)
    with torch.no_grad():
        stages = pipeline(model, args, kwargs, split_spec=dict.fromkeys(points, SplitPoint.BEGINNING))
    process_group = group.process_group if isinstance(group, TorchGroup) else None
    return ScheduleGPipe(stages.build_stage(group.rank, group.device, process_group), chunks)
