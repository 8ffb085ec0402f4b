"""Steps of a Llama: ms, ratio to eager PyTorch by hand, MFU and peak memory, of contenders that take turns.

    python -m benchmarks.gpu.training step      # 1.26 B parameters, sequence 4096, batch 4, one device
    python -m benchmarks.gpu.training fsdp      # the same under FSDP2
    python -m benchmarks.gpu.training launch    # 0.37 B, sequence 512, batch 2: the host's share is large

A step is forward, backward, clip_grad_norm_, fused AdamW and zero_grad on fp32 weights under bf16. All contenders start
from the same weights, train on the same tokens, and must have the same losses. They live in one process and take turns
in blocks of steps, so the memory of a contender is what it adds to that of the others at rest.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from paceline import Accelerator, FP8Config, FullyShardedDataParallelPlugin, TorchDynamoPlugin
from paceline.nn import linear_cross_entropy

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_NORM = 1.0
COMPARED_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, and the batches that it trains on."""

    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int
    sequence: int
    batch: int
    rounds: int
    block: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequence * self.batch

    def flops(self, parameters: int) -> float:
        """Floating-point operations of a step: 6 for each weight of a product and token, and causal attention."""
        products = parameters - self.vocabulary * self.width
        attention = 6 * self.layers * self.sequence * self.width
        return float(self.tokens * (6 * products + attention))


LARGE = Case(layers=22, width=2048, inner=5632, heads=32, vocabulary=32_000, sequence=4096, batch=4, rounds=6, block=2)
MEDIUM = Case(layers=8, width=2048, inner=5632, heads=32, vocabulary=32_000, sequence=4096, batch=4, rounds=4, block=2)
SMALL = Case(layers=24, width=1024, inner=2816, heads=16, vocabulary=32_000, sequence=512, batch=2, rounds=12, block=5)


class WithLoss(nn.Module):
    """A causal language model of transformers whose forward returns the loss.

    Args:
        model: The language model.
        loss: `dense`: the model's own. `compiled`: the same, compiled with the head. `chunked`: without all logits.
    """

    def __init__(self, model: Any, loss: str) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        # A script finds its blocks in the model of transformers; the wrapper has none of its own.
        self._no_split_modules = model._no_split_modules
        self._compiled = torch.compile(_head_loss) if loss == "compiled" else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean loss of all next tokens, shape []."""
        if self.loss == "dense":
            loss: Tensor = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
            return loss
        hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        targets = nn.functional.pad(tokens, (0, 1), value=-100)[:, 1:]
        weight = self.model.lm_head.weight
        if self._compiled is not None:
            return self._compiled(hidden, weight, targets)
        return linear_cross_entropy(hidden, weight, targets)


def _head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = nn.functional.linear(hidden, weight).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_model(case: Case, loss: str) -> WithLoss:
    """Build the model on the device, always with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    build: Any = LlamaConfig
    config = build(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=case.inner,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        max_position_embeddings=case.sequence,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return WithLoss(LlamaForCausalLM(config), loss)


def blocks_of(model: WithLoss) -> nn.ModuleList:
    """The decoder layers."""
    layers: nn.ModuleList = model.model.model.layers
    return layers


class Contender:
    """One way to train; subclasses prepare the model.

    Args:
        title: In the table.
        case: What is trained.
        loss: See `WithLoss`.
        settings: Of the subclass.
    """

    def __init__(self, title: str, case: Case, loss: str = "dense", **settings: Any) -> None:
        self.title, self.case, self.loss, self.settings = title, case, loss, settings
        self.losses: list[float] = []
        self.times: list[float] = []
        self.peak = 0.0
        self.model: Any = None
        self.optimizer: Any = None
        self.accelerator: Any = None

    def build(self) -> None:
        """Make and prepare model and optimizer."""
        self.model = make_model(self.case, self.loss)
        self.prepare()

    def prepare(self) -> None:
        """Prepare them."""
        raise NotImplementedError

    def make_optimizer(self) -> None:
        """The optimizer of all contenders."""
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def begin(self) -> None:
        """Set what this contender changes in the whole process."""

    def end(self) -> None:
        """Undo it, for the others."""

    def step(self, tokens: Tensor) -> Tensor:
        """One optimizer step; returns the loss."""
        raise NotImplementedError


class Raw(Contender):
    """PyTorch by hand; `fsdp`, `compiled` and `fp8` say how."""

    def prepare(self) -> None:
        """Convert, compile and shard, in this order."""
        settings = self.settings
        if settings.get("fp8"):
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training

            config = Float8LinearConfig.from_recipe_name(settings["fp8"])
            if settings.get("fsdp"):
                config = replace(config, enable_fsdp_float8_all_gather=True)
            for block in blocks_of(self.model):
                convert_to_float8_training(block, config=config)
        compiled = settings.get("compiled")
        if compiled:
            arguments = compiled if isinstance(compiled, dict) else {}
            for block in blocks_of(self.model):
                block.compile(**arguments)
        if settings.get("whole"):
            self.model.compile(**settings["whole"])
        self.mixed = not settings.get("fsdp")
        if settings.get("fsdp"):
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
            for block in blocks_of(self.model):
                fully_shard(block, mp_policy=policy)
            fully_shard(self.model, mp_policy=policy)
        self.make_optimizer()

    def step(self, tokens: Tensor) -> Tensor:
        """One optimizer step."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.mixed):
            loss: Tensor = self.model(tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.settings.get("fp8") and self.settings.get("fsdp"):
            from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

            precompute_float8_dynamic_scale_for_fsdp(self.model)
        return loss.detach()


class Paceline(Contender):
    """Through the Accelerator; `dynamo`, `precision`, `handlers` and `attention` are its arguments."""

    def begin(self) -> None:
        """Use its kernels of attention, if there are any."""
        self.accelerator.strategy.attention.use()

    def end(self) -> None:
        """Leave the others those of torch."""
        self.accelerator.strategy.attention.release()

    def prepare(self) -> None:
        """Prepare model and optimizer in one call."""
        settings: dict[str, Any] = {"mixed_precision": self.settings.get("precision", "bf16")}
        settings["kwargs_handlers"] = self.settings.get("handlers", ())
        settings["attention_kernels"] = self.settings.get("attention")
        if self.settings.get("fsdp"):
            plugin = self.settings["fsdp"]
            settings["fsdp_plugin"] = FullyShardedDataParallelPlugin() if plugin is True else plugin
            settings["strategy"] = "fsdp"
        if "cuda_graphs" in self.settings:
            settings["dynamo_plugin"] = TorchDynamoPlugin(cuda_graphs=self.settings["cuda_graphs"])
        if "dynamo" in self.settings:
            backend = self.settings["dynamo"]
            regional = backend not in ("no", "auto")
            settings["dynamo_plugin"] = TorchDynamoPlugin(
                backend=backend,
                use_regional_compilation=regional,
                activation_memory_budget=self.settings.get("budget", 1.0),
            )
        self.accelerator = Accelerator(**settings)
        self.make_optimizer()
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.parameters = list(self.model.parameters())

    def step(self, tokens: Tensor) -> Tensor:
        """One optimizer step."""
        accelerator = self.accelerator
        with accelerator.accumulate(self.model):
            loss: Tensor = self.model(tokens)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(self.parameters, MAX_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


def contenders_of(name: str) -> list[Contender]:
    """The contenders of one table; the first one is what the others are compared with."""
    match name:
        case "step":
            return [
                Raw("raw eager", LARGE),
                Paceline("paceline, not compiled", LARGE, dynamo="no"),
                Raw("raw, blocks compiled, loss compiled", LARGE, "compiled", compiled=True),
                Paceline("paceline, blocks compiled, chunked loss", LARGE, "chunked", dynamo="inductor"),
            ]
        case "default":
            return [
                Raw("raw eager", LARGE),
                Paceline("paceline by default", LARGE, settle=12),
                Paceline("paceline by default, chunked loss", LARGE, "chunked", settle=12),
                Paceline("the same, attention by torch", LARGE, "chunked", settle=12, attention="torch"),
            ]
        case "fp8":
            return [
                Raw("raw eager", LARGE),
                Raw(
                    "raw, fp8 tensorwise, blocks and loss compiled", LARGE, "compiled", compiled=True, fp8="tensorwise"
                ),
                Paceline("paceline, fp8, chunked loss", LARGE, "chunked", precision="fp8", settle=2),
            ]
        case "fp8-rowwise":
            rowwise = [FP8Config(recipe="rowwise")]
            return [
                Raw("raw eager", LARGE),
                Raw("raw, fp8 rowwise, chunked loss", LARGE, "chunked", compiled=True, fp8="rowwise"),
                Paceline(
                    "paceline, fp8 rowwise, chunked loss", LARGE, "chunked", precision="fp8", handlers=rowwise, settle=2
                ),
            ]
        case "fp8-fsdp":
            return [
                Raw("raw FSDP2 eager", LARGE, fsdp=True),
                Raw(
                    "raw FSDP2, fp8 gathered, chunked loss",
                    LARGE,
                    "chunked",
                    fsdp=True,
                    compiled=True,
                    fp8="tensorwise",
                ),
                Paceline("paceline FSDP2, fp8, chunked loss", LARGE, "chunked", fsdp=True, precision="fp8", settle=2),
            ]
        case "fsdp":
            return [
                Raw("raw FSDP2 eager", LARGE, fsdp=True),
                Paceline("paceline FSDP2, not compiled", LARGE, fsdp=True, dynamo="no"),
                Raw("raw FSDP2, blocks compiled, chunked loss", LARGE, "chunked", fsdp=True, compiled=True),
                Paceline(
                    "paceline FSDP2, blocks compiled, chunked loss", LARGE, "chunked", fsdp=True, dynamo="inductor"
                ),
            ]
        case "fsdp-2":
            raw = Raw("raw FSDP2, blocks compiled, chunked loss", LARGE, "chunked", fsdp=True, compiled=True)
            plain = FullyShardedDataParallelPlugin(keep_last_unit=False)
            ways = {
                "every unit dropped": plain,
                "last unit kept": plain.changed(keep_last_unit=True),
                "last unit kept, 2 gathered ahead": plain.changed(keep_last_unit=True, prefetch_units=2),
                "last unit kept, own group": plain.changed(keep_last_unit=True, separate_reduce_scatter_group=True),
            }
            return [
                raw,
                *(
                    Paceline(f"paceline, {name}", LARGE, "chunked", fsdp=way, dynamo="inductor")
                    for name, way in ways.items()
                ),
                Paceline(
                    "paceline, last unit kept, fp8",
                    LARGE,
                    "chunked",
                    fsdp=ways["last unit kept"],
                    precision="fp8",
                    settle=2,
                ),
            ]
        case "fsdp-default":
            return [
                Raw("raw FSDP2 eager", LARGE, fsdp=True),
                Paceline("paceline FSDP2 by default", LARGE, fsdp=True, settle=12),
                Paceline("paceline FSDP2 by default, chunked loss", LARGE, "chunked", fsdp=True, settle=12),
            ]
        case "memory":
            eager = FullyShardedDataParallelPlugin()
            full = FullyShardedDataParallelPlugin(activation_checkpointing=True)
            products = full.changed(activation_checkpointing_policy="products")
            return [
                Paceline("compiled", MEDIUM, "chunked", fsdp=eager, dynamo="inductor"),
                *(
                    Paceline(
                        f"compiled, budget {budget}", MEDIUM, "chunked", fsdp=eager, dynamo="inductor", budget=budget
                    )
                    for budget in (0.75, 0.5, 0.25, 0.0)
                ),
                Paceline("compiled, all but products recomputed", MEDIUM, "chunked", fsdp=products, dynamo="inductor"),
                Paceline("compiled, everything recomputed", MEDIUM, "chunked", fsdp=full, dynamo="inductor"),
            ]
        case "launch":
            return [
                Raw("raw eager", SMALL),
                Paceline("paceline, not compiled", SMALL, dynamo="no"),
                Raw("raw, blocks compiled, loss compiled", SMALL, "compiled", compiled=True),
                Paceline("paceline, blocks compiled", SMALL, dynamo="inductor"),
                Paceline("paceline, blocks compiled, chunked loss", SMALL, "chunked", dynamo="inductor"),
            ]
        case "launch-ways":
            compiled: dict[str, Any] = {"compiled": True}
            graphs = {"mode": "reduce-overhead"}
            return [
                Raw("raw eager", SMALL),
                Raw("raw, blocks compiled", SMALL, **compiled),
                Raw("raw, blocks compiled, C++ calls them", SMALL, compiled={"options": {"cpp_wrapper": True}}),
                Raw("raw, whole model compiled", SMALL, whole={}),
                Raw("raw, whole model compiled, CUDA graphs", SMALL, whole=graphs),
                Raw("raw, blocks compiled, CUDA graphs", SMALL, compiled=graphs),
            ]
        case "launch-default":
            return [
                Raw("raw eager", SMALL),
                Raw("raw, blocks compiled, loss compiled", SMALL, "compiled", compiled=True),
                Paceline("paceline by default, chunked loss", SMALL, "chunked", settle=24),
                Paceline("paceline by default", SMALL, settle=24),
                Paceline("paceline by default, without CUDA graphs", SMALL, settle=24, cuda_graphs=False),
            ]
    raise ValueError(name)


def synchronized(work: Callable[[], Any]) -> float:
    """Seconds of some work on the device; all ranks begin together."""
    if dist.is_initialized():
        dist.barrier()
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def agreed(stop: bool) -> bool:
    """Whether any rank wants to stop: ranks that took turns alone would wait for each other for ever."""
    if not dist.is_initialized():
        return stop
    flag = torch.tensor([float(stop)], device="cuda")
    dist.all_reduce(flag)
    return bool(flag)


def num_ranks() -> int:
    """How many processes take part."""
    return dist.get_world_size() if dist.is_initialized() else 1


def take_steps(contender: Contender, batches: list[Tensor]) -> None:
    """One optimizer step on each batch."""
    for tokens in batches:
        contender.step(tokens)


def matmul_rate() -> float:
    """Floating-point operations a second of a large bf16 product, as measured here and now."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    times = [synchronized(lambda: left @ right) for _ in range(10)]
    return 2 * 8192**3 / statistics.median(times)


def batches_of(case: Case) -> list[Tensor]:
    """Tokens of all compared steps, the same for every contender; each rank has its own."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(1 + rank)
    shape = (case.batch, case.sequence)
    return [torch.randint(case.vocabulary, shape, generator=generator).cuda() for _ in range(COMPARED_STEPS)]


def warm_up(contender: Contender, batches: list[Tensor]) -> float:
    """Build, compile, and take the compared steps; returns the seconds."""
    started = time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.build()
    contender.losses = [float(contender.step(batch)) for batch in batches]
    for _ in range(contender.settings.get("settle", 0)):
        contender.step(batches[0])
    if contender.settings.get("settle"):
        print(contender.accelerator.describe(), flush=True)
    torch.cuda.reset_peak_memory_stats()
    contender.step(batches[0])
    contender.peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    contender.end()
    return time.perf_counter() - started


def measure(name: str, contenders: list[Contender], seconds: float) -> dict[str, Any]:
    """Build all contenders, compare their losses, and let them take turns for `seconds` at most."""
    started = time.perf_counter()
    rate = matmul_rate()
    case = contenders[0].case
    batches = batches_of(case)
    usable = []
    for contender in contenders:
        try:
            spent = warm_up(contender, batches)
        except Exception as error:  # One row that fails must not take the others along.
            print(f"{contender.title}: {type(error).__name__}: {str(error)[:1500]}", flush=True)
            contender.model = contender.optimizer = None
            continue
        print(f"{contender.title}: built in {spent:.0f} s, losses {contender.losses}", flush=True)
        usable.append(contender)
    for turn in range(case.rounds):
        order = usable[turn % len(usable) :] + usable[: turn % len(usable)]
        for contender in order:
            contender.begin()
            for _ in range(2 if turn == 0 else 0):
                contender.step(batches[0])
            steps = [batches[i % len(batches)] for i in range(case.block)]
            took = synchronized(partial(take_steps, contender, steps))
            contender.times.append(took / case.block * 1000)
            contender.end()
        if agreed(time.perf_counter() - started > seconds):
            break
    first = usable[0]
    # Sharded parameters tell their whole number of elements, too.
    parameters = sum(p.numel() for p in first.model.parameters())
    rows = []
    for contender in usable:
        middle = statistics.median(contender.times)
        ratios = [one / other for one, other in zip(contender.times, first.times, strict=True)]
        gap = max(abs(a - b) / b for a, b in zip(contender.losses, first.losses, strict=True))
        rows.append(
            {
                "contender": contender.title,
                "ms": middle,
                "ratio": statistics.median(ratios),
                "spread": [min(ratios), max(ratios)],
                "mfu": case.flops(parameters) / (middle / 1000) / rate,
                "gib": contender.peak,
                "tokens_s": case.tokens / (middle / 1000),
                "loss_gap": gap,
            }
        )
    return {
        "name": name,
        "parameters": parameters,
        "matmul_tflops": rate / 1e12,
        "rounds": len(first.times),
        "rows": rows,
    }


def open_group() -> None:
    """Open the process group: that of torchrun, or of this process alone."""
    if "RANK" not in os.environ:
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", device))


def main() -> None:
    """Measure one table, and print it as JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--seconds", type=float, default=150.0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here.")
    if "fsdp" in args.name or args.name == "memory":
        open_group()
    found = measure(args.name, contenders_of(args.name), args.seconds)
    if num_ranks() == 1 or dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    # Threads of compilers and process groups have nothing left to do.
    os._exit(0)


if __name__ == "__main__":
    main()
