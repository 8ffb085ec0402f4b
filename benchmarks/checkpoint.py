"""The cost of saving and loading a training state: paceline, Accelerate, torch.save, DCP, and a hand-written copy.

    python benchmarks/checkpoint.py                              # 200 M parameters, one process
    python benchmarks/checkpoint.py --processes 2 --millions 1260  # FSDP2 over two ranks, with AdamW
    python benchmarks/checkpoint.py --millions 5 --rounds 2      # a quick look

All contenders save the same kind of model with AdamW after the same number of steps. They take turns in the same
processes and write to the same folder, which is emptied in between. The table shows how long the training thread is
blocked, how long until the files are complete (flushed to disk and renamed, where the contender does so), their size,
the peak growth of host memory, and how long loading takes. For contenders that write while training continues, steps
during the save are compared with steps before it. The script starts its own processes.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.multiprocessing.spawn import spawn as spawn_ranks
from torch.nn import functional as F

from paceline import Accelerator, FullyShardedDataParallelPlugin

VOCABULARY = 32_000


class Block(nn.Module):
    """A decoder block of 12 x width^2 parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = max(1, width // 128)
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(y)
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Decoder(nn.Module):
    """A decoder of about `millions` million parameters."""

    def __init__(self, millions: int) -> None:
        super().__init__()
        width = 2048 if millions >= 800 else 1024 if millions >= 150 else 256
        layers = max(1, round((millions * 1e6 - VOCABULARY * width) / (12 * width**2)))
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


@dataclass
class Measured:
    """Seconds, bytes and ratios of one contender, one entry per round."""

    blocked: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    growth: list[float] = field(default_factory=list)
    size: int = 0
    steps: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Training:
    """The model that all contenders but Accelerate's save."""

    def __init__(self, accelerator: Any, millions: int) -> None:
        torch.manual_seed(0)
        self.accelerator = accelerator
        with accelerator.device:
            model: Any = Decoder(millions)
        fused = accelerator.device.type == "cuda"
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        batch = (4, 1024) if fused else (1, 64)
        self.tokens = torch.randint(0, VOCABULARY, batch, device=accelerator.device)
        self.step()

    def step(self) -> float:
        """Take a step; return the seconds until the device has finished it."""
        begun = time.perf_counter()
        logits = self.model(self.tokens)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), self.tokens[:, 1:].flatten())
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait(self.accelerator.device)
        return time.perf_counter() - begun


def wait(device: torch.device) -> None:
    """Let the host wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Contender(ABC):
    """One way to save a training."""

    name = ""
    trains_during_save = False

    def __init__(self, training: Training) -> None:
        self.training = training

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Save; return when training may continue."""

    def finish(self) -> str:
        """Return a note once the files are complete."""
        return ""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Load what was saved."""

    def close(self) -> None:  # noqa: B027
        """Release memory."""


class Paceline(Contender):
    """`save_state`, blocking."""

    name = "paceline"

    def save(self, folder: Path) -> None:
        self.training.accelerator.save_state(folder / "state", blocking=not self.trains_during_save)

    def finish(self) -> str:
        self.training.accelerator.wait_for_save()
        times = self.training.accelerator._checkpoints.times
        return (
            f"plan {times.planned:.2f} write {times.written:.2f} fsync {times.synced:.2f} commit {times.committed:.2f}"
        )

    def load(self, folder: Path) -> None:
        self.training.accelerator.load_state(folder / "state")


class PacelineAsync(Paceline):
    """`save_state(blocking=False)`."""

    name = "paceline, background"
    trains_during_save = True

    def close(self) -> None:
        self.training.accelerator.wait_for_save()


class TorchSave(Contender):
    """Each rank pickles its own shard, which only the same number of ranks can load."""

    name = "torch.save of each rank's part"

    def _state(self) -> dict[str, Any]:
        model, optimizer = self.training.model, self.training.optimizer
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def save(self, folder: Path) -> None:
        rank = self.training.accelerator.process_index
        torch.save(self._state(), folder / f"rank-{rank}.pt")
        self.training.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        rank = self.training.accelerator.process_index
        state = torch.load(folder / f"rank-{rank}.pt", map_location="cpu", weights_only=False)
        self.training.model.load_state_dict(state["model"])
        self.training.optimizer.load_state_dict(state["optimizer"])
        self.training.accelerator.wait_for_everyone()


class Dcp(Contender):
    """`dcp.save` with its own writer."""

    name = "dcp.save"

    def _state(self) -> dict[str, Any]:
        accelerator = self.training.accelerator
        model = accelerator.unwrap_model(self.training.model)
        weights, moments = get_state_dict(model, self.training.optimizer.optimizer)
        return {"model": weights, "optimizer": moments}

    def save(self, folder: Path) -> None:
        dcp_save(self._state(), checkpoint_id=folder / "dcp")

    def load(self, folder: Path) -> None:
        state = self._state()
        dcp_load(state, checkpoint_id=folder / "dcp")
        model = self.training.accelerator.unwrap_model(self.training.model)
        optimizer = self.training.optimizer.optimizer
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


class DcpAsync(Dcp):
    """`dcp.async_save` with a gloo group of its own."""

    name = "dcp.async_save"
    trains_during_save = True
    group: Any = None

    def save(self, folder: Path) -> None:
        if self.group is None and dist.is_initialized():
            self.group = dist.new_group(backend="gloo")
        self.future: Any = dcp_async_save(self._state(), checkpoint_id=folder / "dcp", process_group=self.group)

    def finish(self) -> str:
        self.future.result()
        return ""


class Pool(Contender):
    """Local shards copied on a side stream into a reused pinned buffer, and written as plain bytes by a thread.

    No header, no checksum, no fsync, no commit: how fast it could be.
    """

    name = "hand-written pinned pool"
    trains_during_save = True

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self.pool: list[Tensor] = []

    def _tensors(self) -> list[Tensor]:
        tensors = list(self.training.model.parameters())
        for state in self.training.optimizer.optimizer.state.values():
            tensors += [value for value in state.values() if torch.is_tensor(value)]
        return [value.to_local() if hasattr(value, "to_local") else value.detach() for value in tensors]

    def save(self, folder: Path) -> None:
        tensors = self._tensors()
        cuda = self.training.accelerator.device.type == "cuda"
        if not self.pool:
            self.pool = [torch.empty(t.shape, dtype=t.dtype, pin_memory=cuda) for t in tensors]
            self.stream = torch.cuda.Stream() if cuda else None  # type: ignore[no-untyped-call]
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for kept, tensor in zip(self.pool, tensors, strict=True):
                    kept.copy_(tensor, non_blocking=True)
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            for kept, tensor in zip(self.pool, tensors, strict=True):
                kept.copy_(tensor)
        self.path = folder / f"rank-{self.training.accelerator.process_index}.bin"
        self.thread = threading.Thread(target=self._write)
        self.thread.start()

    def _write(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()
        with self.path.open("wb", buffering=0) as file:
            for kept in self.pool:
                array: Any = kept.reshape(-1).view(torch.uint8).numpy()
                view = memoryview(array)
                while view:
                    view = view[file.write(view) :]

    def finish(self) -> str:
        self.thread.join()
        return ""

    def load(self, folder: Path) -> None:
        self.training.accelerator.wait_for_everyone()

    def close(self) -> None:
        self.pool = []


class HfAccelerate(Contender):
    """Accelerate's `save_state`, on its own copy of the model."""

    name = "Accelerate save_state"

    def __init__(self, training: Training, millions: int) -> None:
        import accelerate

        arguments: dict[str, Any] = {}
        if dist.is_initialized():
            plugin = accelerate.FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["Block"],
                state_dict_type="SHARDED_STATE_DICT",
                cpu_ram_efficient_loading=False,
            )
            arguments["fsdp_plugin"] = plugin
        made = accelerate.Accelerator(cpu=training.accelerator.device.type == "cpu", **arguments)
        super().__init__(Training(made, millions))

    def save(self, folder: Path) -> None:
        self.training.accelerator.save_state(str(folder / "accelerate"))
        self.training.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        self.training.accelerator.load_state(str(folder / "accelerate"))
        self.training.accelerator.wait_for_everyone()


class Watch:
    """The peak growth of this process's memory while open, in bytes."""

    def __enter__(self) -> Watch:
        self._process = psutil.Process()
        self._before = self.peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.growth = self.peak - self._before


def measure(contender: Contender, folder: Path, measured: Measured) -> None:
    """Save, train meanwhile where the contender allows it, and load."""
    training = contender.training
    training.accelerator.wait_for_everyone()
    usual = statistics.median(training.step() for _ in range(5))
    wait(training.accelerator.device)
    with Watch() as watch:
        begun = time.perf_counter()
        contender.save(folder)
        measured.blocked.append(time.perf_counter() - begun)
        if contender.trains_during_save:
            busy = [training.step() for _ in range(8)]
            measured.steps.append(statistics.median(busy) / usual)
        note = contender.finish()
        measured.total.append(time.perf_counter() - begun)
    measured.growth.append(watch.growth)
    if note:
        measured.notes.append(note)
    training.accelerator.wait_for_everyone()
    measured.size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    begun = time.perf_counter()
    contender.load(folder)
    wait(training.accelerator.device)
    measured.load.append(time.perf_counter() - begun)
    training.accelerator.wait_for_everyone()


def contenders(training: Training, millions: int, names: list[str]) -> list[Contender]:
    """The contenders that can run here."""
    made: list[Contender] = [kind(training) for kind in (Paceline, PacelineAsync, TorchSave, Dcp, DcpAsync, Pool)]
    if importlib.util.find_spec("accelerate") is not None:
        try:
            made.append(HfAccelerate(training, millions))
        except Exception as error:
            if training.accelerator.is_main_process:
                print(f"Accelerate is left out: {type(error).__name__}: {error}")
    return [contender for contender in made if not names or any(name in contender.name for name in names)]


def run(rank: int, arguments: argparse.Namespace, port: int, root: str) -> None:
    """One rank of the measurement."""
    size = arguments.processes
    # benchmarks/deepspeed.py would be imported in place of the package.
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    plugin = FullyShardedDataParallelPlugin(transformer_cls_names_to_wrap=("Block",)) if size > 1 else None
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=cpu, strategy="fsdp" if plugin else "single", fsdp_plugin=plugin)
    training = Training(accelerator, arguments.millions)
    table: dict[str, Measured] = {}
    active = contenders(training, arguments.millions, arguments.only)
    for _ in range(arguments.rounds):
        for contender in active:
            folder = Path(root) / contender.name.replace(" ", "-").replace(",", "")
            if accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            accelerator.wait_for_everyone()
            measured = table.setdefault(contender.name, Measured())
            measure(contender, folder, measured)
            if accelerator.is_main_process:
                last = f"blocked {measured.blocked[-1]:.3f} s, complete {measured.total[-1]:.2f} s"
                notes = " ".join(measured.notes[-1:])
                print(f"{contender.name}: {last}, load {measured.load[-1]:.2f} s, {notes}", file=sys.stderr, flush=True)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
            gc.collect()
    for contender in active:
        contender.close()
    if accelerator.is_main_process:
        print_table(table, training, arguments)
    accelerator.wait_for_everyone()


def print_table(table: dict[str, Measured], training: Training, arguments: argparse.Namespace) -> None:
    """Print a Markdown table: the first save, then medians of the later ones."""
    count = sum(p.numel() for p in training.model.parameters())
    device = training.accelerator.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    print(
        f"\n{count / 1e6:.0f} M parameters + AdamW, {arguments.processes} x {where}, torch {torch.__version__}, ",
        end="",
    )
    print(f"{arguments.rounds} rounds; seconds on rank 0\n")
    print("| | blocked, first | blocked, later | complete | load | GB | host memory + GB | step during a save |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, measured in table.items():
        later = slice(1, None) if len(measured.blocked) > 1 else slice(None)
        steps = f"{statistics.median(measured.steps):.2f} x" if measured.steps else ""
        print(
            f"| {name} | {measured.blocked[0]:.3f} | {statistics.median(measured.blocked[later]):.3f} "
            f"| {statistics.median(measured.total[later]):.2f} | {statistics.median(measured.load):.2f} "
            f"| {measured.size / 1e9:.2f} | {statistics.median(measured.growth[later]) / 1e9:.2f} | {steps} |"
        )
    for name, measured in table.items():
        if measured.notes:
            print(f"\n{name}, last save: {measured.notes[-1]}", end="")
    print()


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="ranks; FSDP2 if more than one")
    parser.add_argument("--millions", type=int, default=200, help="parameters, in millions")
    parser.add_argument("--rounds", type=int, default=3, help="saves per contender")
    parser.add_argument("--only", nargs="*", default=[], help="only contenders whose name contains one of these")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        spawn_ranks(run, (arguments, port, root), nprocs=arguments.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
