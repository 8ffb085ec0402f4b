"""The cost of a training step in raw PyTorch, and what paceline, Accelerate and Lightning Fabric add to it.

    python benchmarks/step_overhead.py                       # one process and DDP over two
    python benchmarks/step_overhead.py --accumulation 1 4    # also with four micro-batches per step
    python benchmarks/step_overhead.py --strategy fsdp       # hand-written FSDP2, and paceline

A step is a batch from the loader, forward, backward, clip_grad_norm_, optimizer.step, scheduler.step and zero_grad;
with accumulation it is all micro-batches of one optimizer step. Every contender trains the same model on the same
global batches with the same optimizer, in its own idiom, and the weights are compared after the warm-up. All contenders
share the processes and take turns in short blocks of steps, in rotating order, so that a slowdown of the machine
affects all of them. Each block is divided by the raw PyTorch block of the same round. Raw PyTorch runs twice: the
distance of the second from 1.00 shows the noise.

The script starts its own processes. Parts that need more accelerators than there are here are left out.
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
import warnings
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn as spawn_ranks
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

MAX_NORM = 1.0
ROWS = 1024
WARM_UP_STEPS = 20
WORLD_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One measurement: everything that its ranks need to know."""

    case: str
    device_type: str
    processes: int
    accumulation: int
    strategy: str
    rounds: int
    block: int
    threads: int
    contenders: tuple[str, ...]
    port: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of one contender."""
        return WARM_UP_STEPS + self.rounds * self.block


class Table(Dataset[tuple[Tensor, Tensor]]):
    """A few rows, repeated often enough that no contender reaches the end of an epoch."""

    def __init__(self, inputs: Tensor, targets: Tensor, length: int) -> None:
        self.inputs, self.targets, self.length = inputs, targets, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = index % ROWS
        return self.inputs[row], self.targets[row]


class MLP(nn.Sequential):
    """Two small layers: the step is almost entirely Python overhead."""

    batch_size = 8

    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))

    @staticmethod
    def rows() -> tuple[Tensor, Tensor]:
        """Make all inputs and targets."""
        return torch.randn(ROWS, 32), torch.randint(10, (ROWS,))


class Transformer(nn.Module):
    """Two causal blocks over 64 tokens, shape [batch, 64] to [batch * 64, 256]."""

    batch_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 128)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.head = nn.Linear(128, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(64))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of every position."""
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden, src_mask=self.mask, is_causal=True)
        logits: Tensor = self.head(hidden)
        return logits.flatten(0, 1)

    @staticmethod
    def rows() -> tuple[Tensor, Tensor]:
        """Make all inputs and targets."""
        tokens = torch.randint(256, (ROWS, 65))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


CASES: dict[str, type[MLP] | type[Transformer]] = {"mlp": MLP, "transformer": Transformer}
BLOCKS = {"mlp": 20, "transformer": 2}
ROUNDS = {"mlp": 300, "transformer": 100}


class Contender(ABC):
    """One way to write the training loop."""

    title: str
    package: str | None = None

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device, self.accumulation = setting, device, setting.accumulation
        torch.manual_seed(0)
        case = CASES[setting.case]
        global_batch = case.batch_size * setting.processes
        table = Table(*case.rows(), length=(setting.steps * setting.accumulation + 4) * global_batch)
        self.loader: Any = DataLoader(table, case.batch_size, pin_memory=device.type != "cpu")
        self.model: Any = case()
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.build()
        self.batches: Iterator[tuple[Tensor, Tensor]] = iter(self.loader)

    @abstractmethod
    def build(self) -> None:
        """Prepare model, optimizer, scheduler and loader."""

    @abstractmethod
    def step(self) -> None:
        """Take one optimizer step."""

    def make_optimizer(self) -> None:
        """Make the optimizer and a scheduler that changes nothing."""
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        # Constant, because Accelerate steps a schedule once per rank and all contenders should train alike.
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1.0)

    def weights(self) -> Tensor:
        """All weights as one vector."""
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in self.model.parameters()]
        return torch.cat([p.detach().float().flatten() for p in whole])


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets.flatten())


class Raw(Contender):
    """A hand-written loop in raw PyTorch."""

    title = "raw PyTorch"

    def build(self) -> None:
        """Prepare without a library."""
        self.model.to(self.device)
        self.distributed = self.setting.processes > 1
        if self.distributed:
            self.spread()
            sampler: DistributedSampler[Any] = DistributedSampler(self.loader.dataset, shuffle=False)
            self.loader = DataLoader(
                self.loader.dataset,
                self.loader.batch_size,
                sampler=sampler,
                pin_memory=self.loader.pin_memory,
            )
        self.make_optimizer()

    def spread(self) -> None:
        """Wrap or shard the model."""
        if self.setting.strategy == "fsdp":
            mesh = init_device_mesh(self.device.type, (self.setting.processes,))
            for block in getattr(self.model, "blocks", ()):
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
            return
        device_ids = None if self.device.type == "cpu" else [self.device.index]
        self.model = DistributedDataParallel(self.model, device_ids=device_ids)

    def hold(self, last: bool) -> AbstractContextManager[Any]:
        """Average gradients over ranks in the last micro-batch only."""
        if self.setting.strategy == "fsdp":
            self.model.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last or not self.distributed else self.model.no_sync()

    def step(self) -> None:
        """See `Contender.step`."""
        for index in range(self.accumulation):
            inputs, targets = next(self.batches)
            inputs = inputs.to(self.device, non_blocking=True)
            targets = targets.to(self.device, non_blocking=True)
            if self.accumulation == 1:
                loss_of(self.model(inputs), targets).backward()  # type: ignore[no-untyped-call]
                continue
            with self.hold(index == self.accumulation - 1):
                loss = loss_of(self.model(inputs), targets) / self.accumulation
                loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()


class RawAgain(Raw):
    """The same once more: shows the noise of the comparison."""

    title = "raw PyTorch, again"


class FacadeContender(Contender):
    """The loop that paceline and Accelerate share, word for word."""

    accelerator: Any

    def prepare(self) -> None:
        """Make the optimizer and pass everything to `prepare`."""
        self.make_optimizer()
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            self.model, self.optimizer, self.loader, self.scheduler
        )

    def step(self) -> None:
        """See `Contender.step`."""
        accelerator, model = self.accelerator, self.model
        for _ in range(self.accumulation):
            inputs, targets = next(self.batches)
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model(inputs), targets))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()


class Paceline(FacadeContender):
    """This library."""

    title = "paceline"
    package = "paceline"

    def build(self) -> None:
        """Prepare in this library's way."""
        from paceline import Accelerator

        self.accelerator = Accelerator(
            gradient_accumulation_steps=self.accumulation,
            cpu=self.device.type == "cpu",
            strategy=self.setting.strategy if self.setting.processes > 1 else "single",
        )
        self.prepare()


class Accelerate(FacadeContender):
    """Hugging Face Accelerate."""

    title = "Accelerate"
    package = "accelerate"

    def build(self) -> None:
        """Prepare in this library's way."""
        from accelerate import Accelerator

        self.accelerator = Accelerator(gradient_accumulation_steps=self.accumulation, cpu=self.device.type == "cpu")
        self.prepare()


class Fabric(Contender):
    """Lightning Fabric, with external launching."""

    title = "Lightning Fabric"
    package = "lightning-fabric"

    def build(self) -> None:
        """Prepare in this library's way."""
        from lightning_fabric import Fabric as LightningFabric
        from lightning_fabric.plugins.environments import TorchElasticEnvironment

        several = self.setting.processes > 1
        self.fabric: Any = LightningFabric(
            accelerator=self.device.type,
            devices=self.setting.processes,
            strategy="ddp" if several else "auto",
            plugins=[TorchElasticEnvironment()] if several else None,
        )
        self.fabric.launch()
        self.make_optimizer()
        self.model, self.optimizer = self.fabric.setup(self.model, self.optimizer)
        self.loader = self.fabric.setup_dataloaders(self.loader)

    def step(self) -> None:
        """See `Contender.step`."""
        fabric, model = self.fabric, self.model
        for index in range(self.accumulation):
            inputs, targets = next(self.batches)
            if self.accumulation == 1:
                fabric.backward(loss_of(model(inputs), targets))
                continue
            with fabric.no_backward_sync(model, enabled=index < self.accumulation - 1):
                fabric.backward(loss_of(model(inputs), targets) / self.accumulation)
        # As in all other contenders; its own default reads the norm on the host to check for inf.
        fabric.clip_gradients(model, self.optimizer, max_norm=MAX_NORM, error_if_nonfinite=False)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()


CONTENDERS: dict[str, type[Contender]] = {
    "raw": Raw,
    "again": RawAgain,
    "paceline": Paceline,
    "accelerate": Accelerate,
    "fabric": Fabric,
}


# What happens in a rank


def run_rank(rank: int, setting: Setting, results: Path) -> None:
    """Measure in one rank; rank 0 writes the seconds per step by contender and round."""
    enter_world(rank, setting)
    device = torch.device(setting.device_type)
    if device.type != "cpu":
        device = torch.device(device.type, rank)
        torch.accelerator.set_device_index(rank)
    if setting.processes > 1:
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        dist.init_process_group(backend)
    contenders = {name: CONTENDERS[name](setting, device) for name in setting.contenders}
    torch.set_num_threads(setting.threads)
    warm_up(contenders)
    seconds = measure(contenders, setting)
    if rank == 0:
        results.write_text(json.dumps(seconds))
    if setting.processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def enter_world(rank: int, setting: Setting) -> None:
    """Set the variables of torchrun, or none of them for a single process."""
    for name in WORLD_VARIABLES:
        os.environ.pop(name, None)
    torch.set_num_threads(setting.threads)
    warnings.filterwarnings("ignore")
    if setting.processes > 1:
        size = str(setting.processes)
        values = (str(rank), size, str(rank), size, "127.0.0.1", str(setting.port))
        os.environ.update(zip(WORLD_VARIABLES, values, strict=True))


def warm_up(contenders: dict[str, Contender]) -> None:
    """Take the first steps, and check that all contenders have the same weights."""
    for contender in contenders.values():
        for _ in range(WARM_UP_STEPS):
            contender.step()
    expected = contenders["raw"].weights()
    for name, contender in contenders.items():
        apart = (contender.weights() - expected).abs().mean().item()
        # Sums in another order differ by 1e-8; another batch or a missing step by 1e-4.
        if not apart < 1e-5:
            raise RuntimeError(f"{name} trained differently: weights differ by {apart:.1e} on average")


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
    if setting.processes > 1:
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


def spawn(setting: Setting) -> dict[str, list[float]]:
    """Run one measurement in processes of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        setting = replace(setting, port=free.getsockname()[1])
    # Set before the children load torch, which creates the thread pool.
    os.environ["OMP_NUM_THREADS"] = str(setting.threads)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "seconds.json"
        spawn_ranks(run_rank, args=(setting, results), nprocs=setting.processes)  # type: ignore[no-untyped-call]
        measured: dict[str, list[float]] = json.loads(results.read_text())
    return measured


def table_rows(setting: Setting, measured: dict[str, list[float]]) -> Iterator[str]:
    """Yield a line per contender, including those that are not installed."""
    where = f"| {setting.case} | {setting.processes} | {setting.accumulation} "
    for name, contender in CONTENDERS.items():
        if setting.strategy == "fsdp" and name not in setting.contenders:
            continue
        if name not in measured:
            yield f"{where}| {contender.title} | not installed | | |"
            continue
        milliseconds = 1e3 * statistics.median(measured[name])
        if name == "raw":
            yield f"{where}| {contender.title} | {milliseconds:.3f} | 1 | |"
            continue
        ratios = [mine / raw for mine, raw in zip(measured[name], measured["raw"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        yield f"{where}| {contender.title} | {milliseconds:.3f} | {middle:.3f} | {low:.3f} - {high:.3f} |"


def installed() -> tuple[str, ...]:
    """Return the contenders that can run here."""
    return tuple(name for name, contender in CONTENDERS.items() if _is_installed(contender.package))


def _is_installed(package: str | None) -> bool:
    return package is None or importlib.util.find_spec(package.replace("-", "_")) is not None


def describe_machine(device_type: str, threads: int) -> str:
    """Name the hardware and the versions in one line."""
    packages = ["torch", *(CONTENDERS[name].package for name in installed())]
    versions = [f"{name} {_version(name)}" for name in packages if name]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{processor_name()}, {cores} cores, {threads} thread(s) per process"]
    if device_type != "cpu":
        count = torch.accelerator.device_count()
        parts.insert(0, f"{count} x {torch.get_device_module(device_type).get_device_name(0)}")
    return "; ".join([*parts, f"Python {platform.python_version()}", ", ".join(versions)])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from its source"


def processor_name() -> str:
    """Return the name of the processor."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    """List the requested measurements that this machine can run."""
    limit = torch.accelerator.device_count() if args.device != "cpu" else max(args.processes)
    for case in args.cases:
        for processes in args.processes:
            if processes > limit:
                print(f"{case} on {processes} processes: left out, there are only {limit} devices", file=sys.stderr)
                continue
            for accumulation in args.accumulation:
                yield Setting(
                    case=case,
                    device_type=args.device,
                    processes=processes,
                    accumulation=accumulation,
                    rounds=args.rounds or ROUNDS[case],
                    block=args.block or max(BLOCKS[case] // accumulation, 1),
                    threads=args.threads,
                    strategy=args.strategy,
                    contenders=installed() if args.strategy == "ddp" else ("raw", "again", "paceline"),
                )


def main() -> None:
    """Measure and print the table."""
    args = arguments()
    print("| model | processes | accumulation | contender | ms per step | ratio to raw | quartiles |")
    print("|---|--:|--:|---|--:|--:|--:|", flush=True)
    for setting in settings(args):
        for line in table_rows(setting, spawn(setting)):
            print(line, flush=True)
    rounds = ", ".join(f"{args.rounds or ROUNDS[case]} of the {case}" for case in args.cases)
    print(f"\n{describe_machine(args.device, args.threads)}; rounds: {rounds}")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found = torch.accelerator.current_accelerator(check_available=True)
    here = "cpu" if found is None else found.type
    add = parser.add_argument
    add("--device", default=here, help=f"cpu, cuda, ... (default: the accelerator if any; here {here})")
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="models (default: both)")
    add("--processes", nargs="+", type=int, default=[1, 2], help="ranks (default: 1 2)")
    add("--strategy", choices=["ddp", "fsdp"], default="ddp", help="on several ranks (fsdp: PyTorch and paceline only)")
    add("--accumulation", nargs="+", type=int, default=[1], help="micro-batches per step (default: 1)")
    add("--rounds", type=int, default=0, help="blocks per contender, at least 2 (default: by model)")
    add("--block", type=int, default=0, help="steps per block (default: by model)")
    add("--threads", type=int, default=1, help="threads per process (default: 1)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
