"""Steps of a Llama on several GPUs: by hand, through paceline, and through the others, in one run of all devices.

    torchrun --standalone --nproc-per-node gpu -m benchmarks.gpu.several fsdp
    torchrun --standalone --nproc-per-node gpu -m benchmarks.gpu.several ddp corner gather

Batches are per device. Steps and comparison are those of `benchmarks.gpu.training`: all contenders have the same
weights and tokens, live in the same processes and take turns. Rank 0 prints each table as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from benchmarks.gpu.training import (
    LARGE,
    MAX_NORM,
    SMALL,
    Contender,
    Paceline,
    Raw,
    blocks_of,
    measure,
    open_group,
    synchronized,
)
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from paceline import Accelerator

DDP_CASE = replace(SMALL, sequence=2048, batch=8, rounds=6, block=3)
CORNER = replace(LARGE, sequence=2048, batch=1, rounds=8, block=4)


class RawDDP(Raw):
    """DistributedDataParallel by hand, under autocast."""

    def prepare(self) -> None:
        """Compile the blocks where asked, and wrap."""
        if self.settings.get("compiled"):
            for block in blocks_of(self.model):
                block.compile()
        self.mixed = True
        device = torch.cuda.current_device()
        self.model = DistributedDataParallel(self.model, [device], gradient_as_bucket_view=True)
        self.make_optimizer()


class WithAccelerate(Contender):
    """Through Hugging Face Accelerate; `fsdp` says that it shards."""

    def prepare(self) -> None:
        """Prepare model and optimizer in one call."""
        import accelerate

        settings: dict[str, Any] = {"mixed_precision": "bf16"}
        if self.settings.get("fsdp"):
            settings["fsdp_plugin"] = accelerate.FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            )
        self.accelerator = accelerate.Accelerator(**settings)
        self.make_optimizer()
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def step(self, tokens: Tensor) -> Tensor:
        """One optimizer step."""
        with self.accelerator.accumulate(self.model):
            loss: Tensor = self.model(tokens)
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


class WithFabric(Contender):
    """Through Lightning Fabric, which shards by a function of the user's."""

    def prepare(self) -> None:
        """Shard as by hand, in Fabric's hook."""
        from lightning.fabric import Fabric
        from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy

        if self.settings.get("fsdp"):
            # The hook gets a model on the meta device or on the CPU, and shards it.
            strategy: Any = ModelParallelStrategy(
                parallelize_fn=_shard_blocks, data_parallel_size=dist.get_world_size(), tensor_parallel_size=1
            )
            precision: Any = None
        else:
            strategy, precision = DDPStrategy(gradient_as_bucket_view=True), "bf16-mixed"
        self.fabric = Fabric(accelerator="cuda", devices=dist.get_world_size(), strategy=strategy, precision=precision)
        self.fabric.launch()
        self.model = self.fabric.setup(self.model)
        self.make_optimizer()
        self.optimizer = self.fabric.setup_optimizers(self.optimizer)

    def step(self, tokens: Tensor) -> Tensor:
        """One optimizer step."""
        loss: Tensor = self.model(tokens)
        self.fabric.backward(loss)
        self.fabric.clip_gradients(self.model, self.optimizer, max_norm=MAX_NORM, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def _shard_blocks(model: Any, _mesh: Any) -> Any:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in blocks_of(model):
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


class WithDeepSpeed(Contender):
    """DeepSpeed's engine alone; `stage` is ZeRO's."""

    def prepare(self) -> None:
        """Make the engine."""
        import deepspeed

        self.make_optimizer()
        config = {
            "train_micro_batch_size_per_gpu": self.case.batch,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": self.settings["stage"], "overlap_comm": True, "contiguous_gradients": True},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": MAX_NORM,
            "steps_per_print": 1_000_000,
        }
        made = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=config)
        self.engine = self.model = made[0]

    def step(self, tokens: Tensor) -> Tensor:
        """One optimizer step."""
        loss: Tensor = self.engine(tokens)
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()


def contenders_of(name: str) -> list[Contender]:
    """The contenders of one table; the first one is what the others are compared with."""
    match name:
        case "fsdp":
            return [
                Raw("raw FSDP2 eager", LARGE, fsdp=True),
                Raw("raw FSDP2, blocks compiled, chunked loss", LARGE, "chunked", fsdp=True, compiled=True),
                Paceline("paceline by default", LARGE, fsdp=True, settle=12),
                Paceline("paceline by default, chunked loss", LARGE, "chunked", fsdp=True, settle=12),
                WithAccelerate("Accelerate", LARGE, fsdp=True),
                WithFabric("Lightning Fabric", LARGE, fsdp=True),
            ]
        case "fp8":
            by_hand = {"fsdp": True, "compiled": True, "fp8": "tensorwise"}
            return [
                Raw("raw FSDP2 eager", LARGE, fsdp=True),
                Raw("raw FSDP2, fp8 gathered, chunked loss", LARGE, "chunked", **by_hand),
                Paceline("paceline, fp8, chunked loss", LARGE, "chunked", fsdp=True, precision="fp8", settle=2),
            ]
        case "zero":
            return [
                Raw("raw FSDP2 eager", LARGE, fsdp=True),
                WithDeepSpeed("DeepSpeed ZeRO-2", LARGE, stage=2),
                WithDeepSpeed("DeepSpeed ZeRO-3", LARGE, stage=3),
            ]
        case "ddp":
            return [
                RawDDP("raw DDP eager", DDP_CASE),
                RawDDP("raw DDP, blocks compiled, chunked loss", DDP_CASE, "chunked", compiled=True),
                Paceline("paceline by default", DDP_CASE, settle=12),
                Paceline("paceline by default, chunked loss", DDP_CASE, "chunked", settle=12),
                WithAccelerate("Accelerate", DDP_CASE),
                WithFabric("Lightning Fabric", DDP_CASE),
            ]
        case "corner":
            return [
                Raw("raw FSDP2 eager", CORNER, fsdp=True),
                Raw("raw FSDP2, blocks compiled, chunked loss", CORNER, "chunked", fsdp=True, compiled=True),
                Paceline("paceline by default", CORNER, fsdp=True, settle=12),
                Paceline("paceline by default, chunked loss", CORNER, "chunked", fsdp=True, settle=12),
            ]
    raise ValueError(name)


def measure_gather(rounds: int = 30, calls: int = 50) -> dict[str, Any]:
    """Gather two small tensors: `Accelerator.gather` against plain all-gathers, in microseconds a call."""
    accelerator = Accelerator()
    first = torch.randn(64, 8, device="cuda")
    second = torch.randint(10, (64,), device="cuda")

    def by_hand() -> list[Tensor]:
        gathered = []
        for tensor in (first, second):
            out = tensor.new_empty((dist.get_world_size() * tensor.shape[0], *tensor.shape[1:]))
            dist.all_gather_into_tensor(out, tensor)
            gathered.append(out)
        return gathered

    def through_paceline() -> Any:
        return accelerator.gather((first, second))

    ways: dict[str, Any] = {"by hand": by_hand, "by hand, again": by_hand, "paceline": through_paceline}
    try:
        import accelerate

        other = accelerate.Accelerator()
        ways["Accelerate"] = lambda: other.gather((first, second))
    except ImportError:
        pass
    times: dict[str, list[float]] = {title: [] for title in ways}
    for turn in range(rounds):
        for title, way in list(ways.items())[turn % len(ways) :] + list(ways.items())[: turn % len(ways)]:
            times[title].append(synchronized(partial(_repeat, way, calls)) / calls * 1e6)
    hand = times["by hand"]
    rows = [
        {
            "contender": title,
            "us": statistics.median(taken),
            "ratio": statistics.median(a / b for a, b in zip(taken, hand, strict=True)),
        }
        for title, taken in times.items()
    ]
    equal = all(torch.equal(a, b) for a, b in zip(by_hand(), cast("Any", through_paceline()), strict=True))
    return {"name": "gather", "equal": equal, "rows": rows}


def _repeat(work: Any, times: int) -> None:
    for _ in range(times):
        work()


def main() -> None:
    """Measure the tables that were named; rank 0 prints one line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="TABLE", help="fsdp, fp8, zero, ddp, corner, gather")
    parser.add_argument("--seconds", type=float, default=100.0, help="for each table")
    args = parser.parse_args()
    open_group()
    for name in args.names:
        found = measure_gather() if name == "gather" else measure(name, contenders_of(name), args.seconds)
        found["devices"] = dist.get_world_size()
        if dist.get_rank() == 0:
            print(json.dumps(found), flush=True)
    dist.barrier()
    # Threads of compilers and process groups have nothing left to do.
    os._exit(0)


if __name__ == "__main__":
    main()
