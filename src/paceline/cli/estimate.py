"""`paceline estimate`: what a model takes in memory, before anything is started."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import click

from paceline.cli.click_helpers import DTYPES, examples
from paceline.cli.interrupts import import_torch
from paceline.environment.byte_sizes import read_byte_size
from paceline.errors import UsageError, counted

if TYPE_CHECKING:
    import torch

    from paceline.cli.model_source import ModelSource
    from paceline.planner.estimation import Estimator, RankMemory

_HELP = """Show what MODEL takes in memory: for inference, and for training under each strategy and number of ranks.

MODEL is the file or folder of a transformers configuration, or a function without arguments that returns the model, as
my_package.models:build or train.py:build. It is built without memory for its weights, and no GPU is needed.

Weights, gradients and optimizer state are counted. Activations are measured: one forward and backward run on tensors
without memory, and what is alive after each operation is noted. `peak` is the most at any moment of a step, as
torch.cuda.max_memory_allocated() reports it for a run; it is less than the sum of the parts, which are not all there at
once. It is that of eager
PyTorch: compiled blocks, and a loss without logits (the chunked loss of the Trainer), take less.

A model of your own needs --inputs for activations: a function that takes a number of samples and returns a batch (a
dictionary, a tuple or a tensor). Without it only the state is shown.

The last lines name the least sharding that fits into --memory, and the batch that fills it. 1 GiB and 3 % of a device
are left for its context, communication and fragments. Without --memory and without a GPU, the ranks divide the memory
of this machine among them.
"""

_GIB = 2**30
_CONTEXT = 1 * _GIB
_FRAGMENTS = 0.03
_COLUMNS = ("weights", "gradients", "optimizer", "activations", "communication", "peak", "host")


class _Bytes(click.ParamType):  # type: ignore[type-arg]  # generic in new versions of click only
    """A size such as 80GiB or 24e9."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = read_byte_size(str(value))
        if found is None:
            self.fail(f"{value!r} is not a size: write, for example, 80GiB", param, ctx)
        return found.number


class _Ranks(click.ParamType):  # type: ignore[type-arg]
    """Numbers of ranks with commas between."""

    name = "N,N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        words = str(value).split(",")
        if not all(word.strip().isdigit() and int(word) > 0 for word in words):
            self.fail(f"{value!r}: write numbers of at least 1, for example 1,8,64", param, ctx)
        return tuple(int(word) for word in words)


@click.command(
    name="estimate",
    help=_HELP,
    epilog=examples(
        "paceline estimate path/to/config.json",
        "paceline estimate meta-llama-folder --num_processes 1,8,64 --memory 80GiB",
        "paceline estimate train.py:build_model --inputs train.py:make_batch --batch_size 16",
        "paceline estimate config.json --sequence_length 8192 --mixed_precision bf16 --json",
    ),
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "token_normalize_func": lambda name: name.replace("-", "_"),
    },
)
@click.argument("model")
@click.option("--num_processes", type=_Ranks(), default="1,2,8", show_default=True, help="Numbers of ranks.")
@click.option("--batch_size", type=click.IntRange(1), default=1, show_default=True, help="Samples of a rank's batch.")
@click.option("--sequence_length", type=click.IntRange(2), help="Tokens of a sample [the model's, at most 2048].")
@click.option(
    "--mixed_precision",
    type=click.Choice(["no", "bf16", "fp16"]),
    default="bf16",
    show_default=True,
    help="Precision of training.",
)
@click.option("--optimizer", default="adamw", show_default=True, help="adamw, adamw_fused, sgd, or module:Class.")
@click.option("--gradient_accumulation_steps", type=click.IntRange(1), default=1, help="Micro-batches per step.")
@click.option("--memory", type=_Bytes(), help="Memory of a device [that of this machine's devices].")
@click.option("--inputs", help="Function that makes a batch of a number of samples.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with sizes in bytes.")
def command(
    model: str,
    num_processes: tuple[int, ...],
    memory: int | None,
    inputs: str | None,
    sequence_length: int | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Estimate; `_HELP` is what users read."""
    import_torch()
    from paceline.cli.model_source import model_source

    source = model_source(model, inputs, sequence_length)
    if not any(True for _ in source.model.parameters()) and not any(True for _ in source.model.buffers()):
        raise UsageError(
            f"MODEL {model} is a {type(source.model).__name__} without parameters and buffers",
            "It takes no memory but for activations, on any number of ranks",
            "Estimate the model that contains it",
        )
    estimate = Estimate(source, num_processes, Device.of(memory), settings)
    try:
        text = json.dumps(estimate.as_dict(), indent=2) if as_json else "\n".join(estimate.lines())
    except (UsageError, click.ClickException):
        raise
    except Exception as error:
        raise UsageError(
            f"A step of {model} cannot be traced: {type(error).__name__}: {str(error).splitlines()[0][:300]}",
            "The trace has shapes and no values, so that a step that depends on values cannot run in it",
            "Give a function of a model without such steps, or a model without --inputs, for the state alone",
        ) from error
    click.echo(text)


@dataclass(frozen=True)
class Device:
    """The memory that the ranks may use.

    Attributes:
        total: Bytes of a device.
        name: What it is.
        is_host: Whether it is the memory of this machine, which all ranks share.
    """

    total: int
    name: str
    is_host: bool = False

    @classmethod
    def of(cls, memory: int | None) -> Device:
        """Describe a device of this size, or that of this machine."""
        import torch

        from paceline.environment.device import describe_device, memory_info

        if memory is not None:
            return cls(memory, f"a device of {_size(memory)}")
        found = torch.accelerator.current_accelerator(check_available=True)
        device = torch.device("cpu") if found is None else torch.device(found.type, 0)
        name, total = describe_device(device), memory_info(device)[1]
        if found is None:
            return cls(total, f"{name}, whose memory the ranks share", is_host=True)
        return cls(total, name)

    def usable(self, ranks: int) -> int:
        """Return the bytes that each of this many ranks may use for tensors."""
        if self.is_host:
            return self.total // ranks
        return max(int(self.total * (1 - _FRAGMENTS)) - _CONTEXT, 0)

    def need(self, row: RankMemory) -> int:
        """Return the bytes that a rank takes of it; what is offloaded stays in it where it is the host's memory."""
        return row.peak + row.host if self.is_host else row.peak


@dataclass(frozen=True)
class Estimate:
    """All that the command shows.

    Attributes:
        source: The model.
        num_processes: Numbers of ranks.
        device: What must hold it.
        settings: The other flags.
    """

    source: ModelSource
    num_processes: tuple[int, ...]
    device: Device
    settings: dict[str, Any]

    @cached_property
    def estimator(self) -> Estimator:
        """Estimates any layout."""
        import torch

        from paceline.planner.estimation import Estimator, OptimizerCost

        compute = DTYPES.get(self.settings["mixed_precision"])
        weights = next((p.dtype for p in self.source.model.parameters()), torch.float32)
        source = self.source
        return Estimator(
            model=source.model,
            blocks=_blocks(source.model),
            loss_of=source.loss if source.batch_of else None,
            call=source.infer if source.batch_of else None,
            optimizer=OptimizerCost.measure(_optimizer(self.settings["optimizer"]), weights),
            compute=getattr(torch, compute) if compute else None,
            accumulation=self.settings["gradient_accumulation_steps"],
            progress=lambda line: click.echo(f"paceline: {line}", err=True),
        )

    @property
    def batch(self) -> int:
        """Samples of a rank's micro-batch."""
        return int(self.settings["batch_size"])

    @cached_property
    def inference(self) -> list[RankMemory]:
        """Inference by dtype."""
        import torch

        return [self.estimator.inference(dtype, self.batch) for dtype in (torch.float32, torch.bfloat16)]

    @cached_property
    def training(self) -> dict[int, list[RankMemory]]:
        """Training by number of ranks."""
        return {ranks: list(self.estimator.rows(ranks, self.batch)) for ranks in self.num_processes}

    def fitting(self, ranks: int) -> tuple[RankMemory, int] | None:
        """Return the least sharding that fits on this many ranks, and the batch that fills it."""
        usable = self.device.usable(ranks)
        for row in self.training[ranks]:
            need = self.device.need(row)
            if need <= usable:
                batch = self.batch
                if self.estimator.loss_of is not None:
                    batch = self.estimator.largest_batch(row.layout, ranks, usable - (need - row.peak))
                return row, batch
        return None

    def lines(self) -> Iterator[str]:
        """Yield the text."""
        parameters = sum(p.numel() for p in self.source.model.parameters())
        yield f"{type(self.source.model).__name__}: {_amount(parameters)} parameters; {self._traced()}"
        yield ""
        yield from _table("inference", self.inference)
        for ranks, rows in self.training.items():
            yield ""
            precision = self.settings["mixed_precision"]
            yield from _table(f"training on {counted(ranks, 'rank')}, mixed_precision {precision}", rows)
        yield ""
        yield f"least sharding that fits into {self.device.name}:"
        for ranks in self.num_processes:
            yield f"  {self._advice(ranks)}"

    def _traced(self) -> str:
        """Say what a step was traced with."""
        if self.source.batch_of is None:
            return "activations not included"
        samples = "" if self.source.samples == "samples" else f", {self.source.samples}"
        return f"batch {self.batch}{samples}"

    def _advice(self, ranks: int) -> str:
        found, usable = self.fitting(ranks), self.device.usable(ranks)
        if found is None and not usable:
            return (
                f"{counted(ranks, 'rank')}: none; nothing is left beside the 1 GiB and 3 % that a device needs for "
                "its context, communication and fragments"
            )
        if found is None:
            smallest = min(self.training[ranks], key=self.device.need)
            more = "Use a larger machine" if self.device.is_host else "Use more ranks"
            return (
                f"{counted(ranks, 'rank')}: none; {smallest.layout.name} takes least, "
                f"{_size(self.device.need(smallest))} of {_size(usable)}. {more}, a smaller batch or shorter samples"
            )
        row, batch = found
        flags = f"   paceline launch --num_processes {ranks} {row.layout.flags}".rstrip()
        return f"{counted(ranks, 'rank')}: {row.layout.name}, {_size(row.peak)}{self._filled(batch)}{flags}"

    def _filled(self, batch: int) -> str:
        """Say which batch fills the device."""
        if self.estimator.loss_of is None:
            return ""
        if self._is_unbounded(batch):
            return "; batches of more than 1,000,000 for each rank fit too"
        return f"; it is full with batches of {batch} for each rank"

    def _is_unbounded(self, batch: int) -> bool:
        """Whether a batch is only the largest that was tried."""
        from paceline.planner.estimation import MOST_SAMPLES

        return self.estimator.loss_of is not None and batch >= MOST_SAMPLES

    def as_dict(self) -> dict[str, Any]:
        """Return the same as plain data."""
        fits: dict[str, dict[str, Any] | None] = {}
        for ranks in self.num_processes:
            found = self.fitting(ranks)
            if found is None:
                fits[str(ranks)] = None
                continue
            row, batch = found
            fits[str(ranks)] = {**_row(row), "largest_batch": batch, "is_lower_bound": self._is_unbounded(batch)}
        return {
            "model": type(self.source.model).__name__,
            "parameters": sum(p.numel() for p in self.source.model.parameters()),
            "batch_size": self.batch,
            "samples": self.source.samples,
            "includes_activations": self.source.batch_of is not None,
            "memory": {
                "total": self.device.total,
                "usable": {str(ranks): self.device.usable(ranks) for ranks in self.num_processes},
            },
            "inference": [_row(row) for row in self.inference],
            "training": {str(ranks): [_row(row) for row in rows] for ranks, rows in self.training.items()},
            "least_sharding": fits,
        }


def _row(row: RankMemory) -> dict[str, Any]:
    return {"layout": row.layout.name, "flags": row.layout.flags, **{name: getattr(row, name) for name in _COLUMNS}}


def _table(title: str, rows: Sequence[RankMemory]) -> Iterator[str]:
    columns = [name for name in _COLUMNS if any(getattr(row, name) for row in rows)]
    width = max(len(title), *(len(row.layout.name) for row in rows))
    yield "  ".join([title.ljust(width), *(name.rjust(13) for name in columns)])
    for row in rows:
        cells = (_size(getattr(row, name)).rjust(13) if getattr(row, name) else "-".rjust(13) for name in columns)
        yield "  ".join([row.layout.name.ljust(width), *cells])


def _size(number: int) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", _GIB), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number / 2**10:.1f} KiB"


def _amount(number: int) -> str:
    for word, size in (("billion", 10**9), ("million", 10**6), ("thousand", 10**3)):
        if number >= size:
            return f"{number / size:.3f} {word}"
    return str(number)


def _blocks(model: torch.nn.Module) -> tuple[str, ...]:
    from paceline.config import FullyShardedDataParallelPlugin
    from paceline.errors import PrepareError
    from paceline.strategies.blocks import find_units

    try:
        return find_units(model, FullyShardedDataParallelPlugin()).names
    except PrepareError:  # one block: the whole model
        return ()


def _optimizer(name: str) -> Any:
    import torch

    from paceline.cli.model_source import load_attribute

    # On accelerators torch's default takes one operation for all parameters at once.
    known: dict[str, Any] = {
        "adamw": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
        "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, foreach=True),
    }
    if name in known:
        return known[name]
    if ":" not in name:
        raise UsageError(
            f"--optimizer {name} is not known",
            f"Names without a module are {', '.join(known)}",
            "Write module:Class, for example torch.optim:Adagrad",
        )
    return load_attribute(name, "--optimizer")
