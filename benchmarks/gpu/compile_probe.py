"""Whether compiled models get the gradients of eager ones on this machine's CPU, and if not, where that begins.

    python -m benchmarks.gpu.compile_probe

Run once as it is and once with CUDA_VISIBLE_DEVICES empty.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch
from tests.support.models import TinyTransformer, make_tokens, token_losses
from tests.support.ranks import close_pools, run_on_ranks
from torch import Tensor

from paceline import Accelerator, TorchDynamoPlugin


def gradients(kind: str, backend: str, optimize: bool = False) -> tuple[float, dict[str, Tensor]]:
    """Loss, and gradients (or weights after a step), of a model by hand."""
    model: Any = TinyTransformer()
    if kind == "whole":
        model.compile(backend=backend)
    elif kind == "blocks":
        for block in model.blocks:
            block.compile(backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = make_tokens(4, seed=0)
    loss = token_losses(model(tokens), tokens).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if optimize:
        optimizer.step()
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
    return float(loss.detach()), found


def compare(title: str, plain: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Print what differs."""
    odd = {
        name: f"{float((found[name] - value).norm() / (value.norm() + 1e-12)):.2g}" if name in found else "missing"
        for name, value in plain.items()
        if name not in found or not torch.allclose(found[name], value, rtol=1e-4, atol=1e-6)
    }
    print(f"{title}: {odd or 'the same'}", flush=True)


def on_rank(strategy: str, kind: str) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, first gradients, and weights after the first step, through the Accelerator."""
    settings: dict[str, Any] = {}
    if kind != "eager":
        settings["dynamo_plugin"] = TorchDynamoPlugin(backend="eager", use_regional_compilation=kind == "blocks")
    accelerator = Accelerator(cpu=True, strategy=strategy, **settings)
    model: Any = TinyTransformer()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    losses, first, after = [], {}, {}
    for i in range(3):
        tokens = make_tokens(4, seed=i)[accelerator.process_index :: accelerator.num_processes]
        loss = token_losses(model(tokens), tokens).mean()
        accelerator.backward(loss)
        named = dict(accelerator.unwrap_model(model).named_parameters())
        if i == 0:
            first = {name: whole(p.grad) for name, p in named.items() if p.grad is not None}
        optimizer.step()
        if i == 0:
            after = {name: whole(p.detach()) for name, p in named.items()}
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    return losses, first, after


def whole(tensor: Any) -> Tensor:
    """A copy of all of it."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.clone()


def main() -> None:
    """Try everything."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    print(f"torch {torch.__version__}, CUDA {torch.cuda.is_available()} (visible: {visible!r}), "
          f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}", flush=True)  # fmt: skip
    for optimize, backend in itertools.product((False, True), ("eager", "aot_eager")):
        _, plain = gradients("eager", backend, optimize)
        for kind in ("blocks", "whole"):
            torch._dynamo.reset()
            _, found = gradients(kind, backend, optimize)
            compare(f"by hand, {kind}, backend {backend}, {'weights' if optimize else 'gradients'}", plain, found)
    torch._dynamo.reset()
    for ranks, strategy in ((1, "single"), (2, "ddp"), (2, "fsdp")):
        losses, first, after = run_on_ranks(ranks, on_rank, strategy, "eager")[0]
        again = run_on_ranks(ranks, on_rank, strategy, "eager")[0]
        print(f"{strategy}: eager {losses}, again {again[0]}", flush=True)
        compare(f"{strategy}, eager again, gradients", first, again[1])
        for kind in ("blocks", "whole"):
            found = run_on_ranks(ranks, on_rank, strategy, kind)[0]
            print(f"{strategy}, {kind}: {found[0]}", flush=True)
            compare(f"{strategy}, {kind}, gradients", first, found[1])
            compare(f"{strategy}, {kind}, weights", after, found[2])
    close_pools()


if __name__ == "__main__":
    main()
