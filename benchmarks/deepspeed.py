"""The cost of a step under ZeRO with paceline and Accelerate, against a hand-written loop over DeepSpeed's engine.

    python benchmarks/deepspeed.py                       # stages 2 and 3 on all accelerators; on a CPU, two ranks
    python benchmarks/deepspeed.py --stages 3 --accumulation 1 4 --precision fp16

A step is all micro-batches of one optimizer step: forward, backward, clipping to a norm of 1, AdamW. Every contender
trains the same model from the same initial values on the same batches, which are already on the device. The table
has the loss after the warm-up, and paceline's must match the bare engine's. All contenders share the processes and take
turns in short blocks of steps, in rotating order, so that a slowdown of the machine affects all of them. Each block is
divided by the bare engine's block of the same round. The bare engine runs twice: the distance of the second from 1.00
shows the noise.

The script starts its own processes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn as spawn_ranks
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_NORM = 1.0
WARM_UP_STEPS = 6
BATCHES = 8
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One measurement: everything that its ranks need to know."""

    device_type: str
    processes: int
    stage: int
    accumulation: int
    precision: str
    rounds: int
    block: int
    contenders: tuple[str, ...]
    width: int
    layers: int
    length: int
    batch_size: int
    port: int = 0


class Block(nn.Module):
    """A causal block of a transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.heads = max(1, width // 64)

    def forward(self, x: Tensor) -> Tensor:
        """Shape [batch, length, width] to the same."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Transformer(nn.Module):
    """A decoder that returns its loss."""

    vocabulary = 512

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.embedding = nn.Embedding(self.vocabulary, setting.width)
        self.blocks = nn.ModuleList(Block(setting.width) for _ in range(setting.layers))
        self.norm = nn.LayerNorm(setting.width)
        self.head = nn.Linear(setting.width, self.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of tokens [batch, length + 1]; shape []."""
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


class Contender(ABC):
    """One way to train under ZeRO."""

    title: str
    package: str | None = None

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device = setting, device
        torch.manual_seed(0)
        model = Transformer(setting)
        with torch.no_grad():
            # The bare engine starts from 16-bit values, so all contenders do.
            for parameter in model.parameters():
                parameter.copy_(parameter.to(DTYPES[setting.precision]).float())
        generator = torch.Generator().manual_seed(dist.get_rank())
        shape = (BATCHES, setting.batch_size, setting.length + 1)
        self.batches = torch.randint(Transformer.vocabulary, shape, generator=generator).to(device)
        self.taken = 0
        self.build(model, torch.optim.AdamW(model.parameters(), lr=3e-4))

    @abstractmethod
    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Prepare for training."""

    @abstractmethod
    def step(self) -> Tensor:
        """Take one optimizer step; return the last loss."""

    def next_batch(self) -> Tensor:
        """The next batch, on the device."""
        self.taken += 1
        return self.batches[self.taken % BATCHES]

    def described(self) -> dict[str, Any]:
        """DeepSpeed's configuration, as a user writes it."""
        setting = self.setting
        told: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": setting.batch_size,
            "gradient_accumulation_steps": setting.accumulation,
            "zero_optimization": {"stage": setting.stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31 - 1,
        }
        if setting.precision == "fp16":
            # Small enough to skip no step.
            told["fp16"] = {"enabled": True, "initial_scale_power": 10}
        elif setting.precision == "bf16":
            told["bf16"] = {"enabled": True}
        return told


class Bare(Contender):
    """A hand-written loop over DeepSpeed's engine."""

    title = "bare DeepSpeed"

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """See `Contender.build`."""
        import deepspeed

        config = {**self.described(), "gradient_clipping": MAX_NORM}
        self.engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def step(self) -> Tensor:
        """See `Contender.step`."""
        for _ in range(self.setting.accumulation):
            loss = self.engine(self.next_batch())
            self.engine.backward(loss)
            self.engine.step()
        result: Tensor = loss
        return result


class BareAgain(Bare):
    """The same once more: shows the noise of the comparison."""

    title = "bare DeepSpeed, again"


class FacadeContender(Contender):
    """The loop that paceline and Accelerate share, word for word."""

    accelerator: Any
    model: Any
    optimizer: Any

    def step(self) -> Tensor:
        """See `Contender.step`."""
        accelerator, model = self.accelerator, self.model
        for _ in range(self.setting.accumulation):
            with accelerator.accumulate(model):
                loss = model(self.next_batch())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                self.optimizer.step()
                self.optimizer.zero_grad()
        result: Tensor = loss
        return result


class Paceline(FacadeContender):
    """This library."""

    title = "paceline"
    package = "paceline"

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """See `Contender.build`."""
        from paceline import Accelerator, DeepSpeedPlugin

        described = self.described()
        described["train_micro_batch_size_per_gpu"] = "auto"
        self.accelerator = Accelerator(
            cpu=self.device.type == "cpu", deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=described)
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)


class Accelerate(FacadeContender):
    """Hugging Face Accelerate."""

    title = "Accelerate"
    package = "accelerate"

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """See `Contender.build`."""
        from accelerate import Accelerator, DeepSpeedPlugin

        plugin = DeepSpeedPlugin(hf_ds_config={**self.described(), "gradient_clipping": MAX_NORM})
        self.accelerator = Accelerator(cpu=self.device.type == "cpu", deepspeed_plugin=plugin)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if self.model is model:
            raise RuntimeError("it does not use DeepSpeed here")


CONTENDERS: dict[str, type[Contender]] = {
    "bare": Bare,
    "again": BareAgain,
    "paceline": Paceline,
    "accelerate": Accelerate,
}


# What happens in a rank


def run_rank(rank: int, setting: Setting, results: Path) -> None:
    """Measure in one rank; rank 0 writes the seconds of a step by contender and round, and what failed."""
    enter_world(rank, setting)
    device = torch.device(setting.device_type)
    if device.type != "cpu":
        device = torch.device(device.type, rank)
        torch.accelerator.set_device_index(rank)
    dist.init_process_group("gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl")
    torch.set_num_threads(1)
    if device.type == "cpu":
        import deepspeed

        # Its shared-memory collectives would be compiled first, for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    contenders, failures = build_all(setting, device)
    losses = warm_up(contenders)
    seconds = measure(contenders, setting)
    if rank == 0:
        results.write_text(json.dumps({"seconds": seconds, "failures": failures, "losses": losses}))
    dist.barrier()
    dist.destroy_process_group()


def enter_world(rank: int, setting: Setting) -> None:
    """Set the variables of torchrun."""
    warnings.filterwarnings("ignore")
    size = str(setting.processes)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=size, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=size,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(setting.port),
    )  # fmt: skip
    if setting.device_type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


def build_all(setting: Setting, device: torch.device) -> tuple[dict[str, Contender], dict[str, str]]:
    """Build the contenders; any but the bare engine may fail, and is left out with the reason."""
    contenders: dict[str, Contender] = {}
    failures: dict[str, str] = {}
    for name in setting.contenders:
        try:
            contenders[name] = CONTENDERS[name](setting, device)
        except Exception as error:
            if name == "bare":
                raise
            traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return contenders, failures


def warm_up(contenders: dict[str, Contender]) -> dict[str, float]:
    """Take the first steps; return the loss of each contender over all ranks."""
    losses = {}
    for name, contender in contenders.items():
        for _ in range(WARM_UP_STEPS):
            loss = contender.step()
        mean = loss.detach().float().clone()
        dist.all_reduce(mean)
        losses[name] = float(mean) / dist.get_world_size()
    return losses


def measure(contenders: dict[str, Contender], setting: Setting) -> dict[str, list[float]]:
    """Let the contenders take turns; return the seconds per step by contender and round."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(setting.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(time_block(contenders[name], setting) / setting.block)
    return seconds


def time_block(contender: Contender, setting: Setting) -> float:
    """Time one block, from all ranks ready and the device idle to the device idle again."""
    synchronize(setting)
    dist.barrier()
    synchronize(setting)
    started = time.perf_counter()
    for _ in range(setting.block):
        contender.step()
    synchronize(setting)
    return time.perf_counter() - started


def synchronize(setting: Setting) -> None:
    if setting.device_type != "cpu":
        torch.accelerator.synchronize()


# What happens in the script itself


def spawn(setting: Setting) -> dict[str, Any]:
    """Run one measurement in processes of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        setting = replace(setting, port=free.getsockname()[1])
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "seconds.json"
        spawn_ranks(run_rank, args=(setting, results), nprocs=setting.processes)  # type: ignore[no-untyped-call]
        measured: dict[str, Any] = json.loads(results.read_text())
    return measured


def table_rows(setting: Setting, measured: dict[str, Any]) -> Iterator[str]:
    """Yield a line per contender, including those that failed or are not installed."""
    where = f"| {setting.stage} | {setting.precision} | {setting.processes} | {setting.accumulation} "
    seconds = measured["seconds"]
    for name, contender in CONTENDERS.items():
        if name not in seconds:
            why = measured["failures"].get(name, "not installed").replace("|", "/")
            yield f"{where}| {contender.title} | {why} | | | |"
            continue
        milliseconds, loss = 1e3 * statistics.median(seconds[name]), f"{measured['losses'][name]:.4f}"
        ratios = [mine / bare for mine, bare in zip(seconds[name], seconds["bare"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        shares = "| 1 | " if name == "bare" else f"| {middle:.3f} | {low:.3f} - {high:.3f} "
        yield f"{where}| {contender.title} | {milliseconds:.2f} {shares}| {loss} |"


def installed() -> tuple[str, ...]:
    """Return the contenders that can run here."""
    packages = {name: contender.package for name, contender in CONTENDERS.items()}
    return tuple(name for name, package in packages.items() if package is None or importlib.util.find_spec(package))


def describe_machine(args: argparse.Namespace) -> str:
    """Name the hardware and the versions in one line."""
    versions = []
    for package in ("torch", "deepspeed", "paceline", "accelerate"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} from its source" if package == "paceline" else f"no {package}")
    cores = len(os.sched_getaffinity(0))
    parts = [f"{cores} cores", f"Python {platform.python_version()}", ", ".join(versions)]
    if args.device != "cpu":
        module: Any = torch.get_device_module(args.device)
        parts.insert(0, f"{torch.accelerator.device_count()} x {module.get_device_name(0)}")
    model = f"{args.layers} blocks of width {args.width}, {args.batch_size} x {args.length} tokens per rank"
    return "; ".join([*parts, model, f"{args.rounds} rounds of {args.block} steps"])


def main() -> int:
    """Measure and print the table."""
    # This folder comes first on the path and would hide the deepspeed package; the ranks inherit the path.
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    args = arguments()
    if importlib.util.find_spec("deepspeed") is None:
        print("DeepSpeed is not installed: pip install 'paceline[deepspeed]'", file=sys.stderr)
        return 1
    print(
        "| stage | precision | processes | accumulation | contender | ms per step | ratio to bare | quartiles | loss |"
    )
    print("|--:|---|--:|--:|---|--:|--:|--:|--:|", flush=True)
    apart = False
    for stage in args.stages:
        for accumulation in args.accumulation:
            setting = Setting(
                device_type=args.device, processes=args.processes, stage=stage, accumulation=accumulation,
                precision=args.precision, rounds=args.rounds, block=args.block, contenders=installed(),
                width=args.width, layers=args.layers, length=args.length, batch_size=args.batch_size,
            )  # fmt: skip
            measured = spawn(setting)
            for line in table_rows(setting, measured):
                print(line, flush=True)
            apart = apart or differs(measured["losses"])
    print(f"\n{describe_machine(args)}")
    if apart:
        print("paceline and the bare engine trained differently: compare the losses", file=sys.stderr)
    return int(apart)


def differs(losses: dict[str, float]) -> bool:
    """Whether paceline's loss differs: rounding accounts for 0.1 %, another batch or a missing step for several."""
    bare = losses["bare"]
    return not abs(losses.get("paceline", bare) - bare) <= 0.005 * abs(bare)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    here = "cpu" if accelerator is None else accelerator.type
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default=here, help=f"cpu, cuda, ... (default: the accelerator if any; here {here})")
    small = parser.parse_known_args()[0].device == "cpu"
    count = 2 if small else torch.accelerator.device_count()
    add("--processes", type=int, default=count, help="ranks (default: all accelerators; 2 on a CPU)")
    add("--stages", nargs="+", type=int, choices=[1, 2, 3], default=[2, 3], help="ZeRO stages (default: 2 3)")
    add("--accumulation", nargs="+", type=int, default=[1], help="micro-batches per step (default: 1)")
    add("--precision", choices=list(DTYPES), default="no" if small else "bf16", help="default: bf16; no on a CPU")
    add("--rounds", type=int, default=10 if small else 40, help="blocks per contender, at least 2")
    add("--block", type=int, default=2 if small else 5, help="steps per block")
    add("--width", type=int, default=64 if small else 1024, help="width of the model")
    add("--layers", type=int, default=2 if small else 16, help="layers of the model")
    add("--length", type=int, default=32 if small else 1024, help="tokens per sample")
    add("--batch_size", type=int, default=2 if small else 8, help="samples per micro-batch and rank")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
