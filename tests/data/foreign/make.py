"""Make the recorded folders beside this file: small trainings, saved by Accelerate, DeepSpeed and torch themselves.

    pip install accelerate==1.15.0 deepspeed==0.19.8     # beside paceline's own environment
    python tests/data/foreign/make.py tests/data/foreign

Each folder gets `expected.safetensors`: the whole weights (`model/NAME`) and optimizer states
(`optimizer/NAME/SLOT`) that the library which wrote it holds in memory.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

STEPS = 3


class Net(nn.Module):
    """Tied weights, a frozen one, a buffer, sizes that divide by nothing, and a parameter smaller than the ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tokens = nn.Embedding(13, 6)
        self.fixed = nn.Linear(6, 6)
        self.hidden = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.back = nn.Linear(7, 6)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.tokens.weight
        self.fixed.weight.requires_grad_(False)
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor([1.5, 0.5]))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.fixed(self.tokens(tokens)) * self.scale[0]
        x = self.back(self.norm(torch.tanh(self.hidden(x)))) * self.gain
        logits: Tensor = self.head(x)
        return logits


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, whose order is not the model's."""
    learning = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": 0.1},
    ]


def names_of(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


def loss_of(model: nn.Module, step: int) -> Tensor:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 13, (4, 5), generator=generator)
    mine = tokens[rank::size]
    logits = model(mine[:, :-1]).float()
    return nn.functional.cross_entropy(logits.reshape(-1, 13), mine[:, 1:].reshape(-1))


def make_accelerate(folder: Path) -> None:
    """What `Accelerator.save_state` writes."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = Net()
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _decay)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    for step in range(STEPS):
        accelerator.backward(loss_of(model, step))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        counter.seen += 4
    _seed(accelerator.process_index)
    accelerator.save_state(str(folder))
    _write_expected(folder, _expected_of_torch(model, optimizer.optimizer))


def make_accelerate_fsdp(folder: Path, kind: str) -> None:
    """The same under FSDP2; Accelerate shards nothing on a CPU, so its functions are called one by one."""
    from types import SimpleNamespace

    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.checkpointing import save_accelerator_state
    from accelerate.state import PartialState
    from accelerate.utils import save_fsdp_model, save_fsdp_optimizer

    PartialState(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    ranks = SimpleNamespace(process_index=dist.get_rank(), num_processes=dist.get_world_size(), is_fsdp2=True)
    model, optimizer, scheduler = _train_sharded()
    _seed(dist.get_rank())
    folder.mkdir(exist_ok=True)
    save_fsdp_model(plugin, ranks, model, str(folder), 0)
    save_fsdp_optimizer(plugin, ranks, optimizer, model, str(folder), 0)
    save_accelerator_state(str(folder), [], [], [scheduler], [], dist.get_rank(), STEPS)
    _write_expected(folder, _expected_of_torch(model, optimizer))


def _train_sharded() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    from torch.distributed.fsdp import fully_shard

    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _decay)
    for step in range(STEPS):
        loss_of(model, step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model, optimizer, scheduler


def _seed(rank: int) -> None:
    random.seed(5 + rank)
    np.random.seed(6 + rank)
    torch.manual_seed(40 + rank)


def _decay(step: int) -> float:
    return 1 / (1 + step)


class Counter:
    """A custom object."""

    def __init__(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "names": ["a", "b"], "table": torch.arange(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def _expected_of_torch(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    from torch.distributed.tensor import DTensor

    def whole(value: Tensor) -> Tensor:
        return value.full_tensor() if isinstance(value, DTensor) else value

    found = {f"model/{name}": whole(value) for name, value in _plain(model).state_dict().items()}
    names = names_of(_plain(model))
    for parameter, state in optimizer.state.items():
        found.update({f"optimizer/{names[id(parameter)]}/{key}": whole(value) for key, value in state.items()})
    return found


def _plain(model: nn.Module) -> nn.Module:
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) else model


def _write_expected(folder: Path, tensors: dict[str, Tensor]) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        copies = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
        save_file(copies, folder / "expected.safetensors")


def make_deepspeed(folder: Path, stage: int, *, bf16: bool = False) -> None:
    """What `engine.save_checkpoint` writes."""
    import deepspeed

    model = Net()
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _decay)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if bf16:
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=settings, dist_init_required=False
    )
    for step in range(STEPS):
        engine.backward(loss_of(engine, step))
        engine.step()
    engine.save_checkpoint(str(folder), client_state={"seen": 12})
    for tool in folder.glob("zero_to_*.py"):
        tool.unlink(missing_ok=True)
    found: dict[str, Tensor] = {"model/scale": model.scale}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            found[f"model/{name}"] = torch.clone(parameter.detach())
        if parameter.requires_grad and stage:
            found.update(_expected_of_engine(engine, name, parameter, found[f"model/{name}"].shape))
    if stage == 0:
        names = names_of(model)
        for held, state in optimizer.state.items():
            found.update({f"optimizer/{names[id(held)]}/{key}": value for key, value in state.items()})
    _write_expected(folder, found)


def _expected_of_engine(engine: Any, name: str, parameter: Any, shape: torch.Size) -> dict[str, Tensor]:
    """The fp32 value and moments of one parameter, put together from all ranks."""
    zero = engine.optimizer
    if hasattr(parameter, "ds_id"):
        found = {key: zero.get_full_hp_param(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
        found["fp32"] = zero.get_full_hp_param(parameter)
    else:
        found = {key: torch.zeros(shape.numel()) for key in ("fp32", "exp_avg", "exp_avg_sq")}
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
            flat = flats[mapping.param_group_index]
            state = {"fp32": flat.detach(), **zero.optimizer.state[flat]}
            for key, value in found.items():
                value[there.start : there.start + there.numel] = state[key][here.start : here.start + here.numel]
        for value in found.values():
            dist.all_reduce(value)
    renamed = {"fp32": f"model/{name}"}
    return {renamed.get(key, f"optimizer/{name}/{key}"): value.view(shape) for key, value in found.items()}


def make_universal(folder: Path) -> None:
    """What `ds_to_universal` makes of a folder of stage 2."""
    if dist.get_rank():
        return
    import subprocess

    import deepspeed.checkpoint.ds_to_universal as tool

    source = folder.parent / "deepspeed_2"
    folder.mkdir(parents=True)
    arguments = ["--input_folder", str(source / f"global_step{STEPS}"), "--output_folder",
                 str(folder / f"global_step{STEPS}_universal"), "--inject_missing_state",
                 "--num_extract_workers", "1", "--num_merge_workers", "1"]  # fmt: skip
    subprocess.run([sys.executable, tool.__file__, *arguments], check=True)
    (folder / "latest_universal").write_text(f"global_step{STEPS}_universal")
    shutil.copy(source / "expected.safetensors", folder)


def make_dcp(folder: Path) -> None:
    """What `torch.distributed.checkpoint.save` writes of a sharded model and its optimizer."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    model, optimizer, _ = _train_sharded()
    weights, state = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": state, "step": STEPS}, checkpoint_id=str(folder))
    _write_expected(folder, _expected_of_torch(model, optimizer))


RECIPES: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "accelerate": (1, make_accelerate, {}),
    "accelerate_ddp": (2, make_accelerate, {}),
    "accelerate_fsdp": (2, make_accelerate_fsdp, {"kind": "SHARDED_STATE_DICT"}),
    "accelerate_fsdp_full": (2, make_accelerate_fsdp, {"kind": "FULL_STATE_DICT"}),
    "dcp": (2, make_dcp, {}),
    "deepspeed_0": (2, make_deepspeed, {"stage": 0}),
    "deepspeed_1": (2, make_deepspeed, {"stage": 1}),
    "deepspeed_2": (2, make_deepspeed, {"stage": 2}),
    "deepspeed_3": (2, make_deepspeed, {"stage": 3}),
    "deepspeed_1_bf16": (2, make_deepspeed, {"stage": 1, "bf16": True}),
    "universal": (2, make_universal, {}),
}


def _run(rank: int, size: int, name: str, out: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT="29611", OMP_NUM_THREADS="1")  # fmt: skip
    torch.set_num_threads(1)
    os.chdir(out)  # some formats write down where they are
    if size > 1 and name != "accelerate_ddp":
        dist.init_process_group("gloo")
    _, make, options = RECIPES[name]
    make(Path(name), **options)
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    """Make all folders, or those named."""
    out, *names = sys.argv[1:]
    for name in names or RECIPES:
        shutil.rmtree(Path(out) / name, ignore_errors=True)
        size = RECIPES[name][0]
        spawn(_run, (size, name, str(Path(out).absolute())), size)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
