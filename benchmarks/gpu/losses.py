"""Time and memory of `paceline.nn.linear_cross_entropy` against the dense loss, over vocabularies.

    python -m benchmarks.gpu.losses

16,384 tokens of width 2048 in bf16 under autocast with an fp32 weight, forward and backward. Memory is the peak above
what is there before: the weight, the hidden states, and the weight's gradient are part of every way.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from benchmarks.gpu.training import synchronized
from torch import Tensor

from paceline.nn import linear_cross_entropy

if TYPE_CHECKING:
    from collections.abc import Callable


def dense(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def torch_own(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options: Any = torch.nn.LinearCrossEntropyOptions()
    own: Any = F.linear_cross_entropy
    loss: Tensor = own(hidden, weight.to(hidden.dtype), targets, options=options)
    return loss


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(hidden, weight.to(hidden.dtype), targets)
    return loss


def cut(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    loss: Tensor = cut_cross_entropy(hidden, weight.to(hidden.dtype), targets)
    return loss


def ways() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """What is installed here."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "dense": dense,
        "dense, compiled": torch.compile(dense, dynamic=False),
        "paceline": linear_cross_entropy,
    }
    for chunk in (1024, 2048, 4096, 8192):
        found[f"paceline, {chunk} tokens"] = lambda *tensors, chunk=chunk: linear_cross_entropy(
            *tensors, chunk_tokens=chunk
        )
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = torch_own
    if importlib.util.find_spec("liger_kernel"):
        found["Liger"] = liger
    if importlib.util.find_spec("cut_cross_entropy"):
        found["cut-cross-entropy"] = cut
    return found


def measure(vocabulary: int, tokens: int, width: int) -> list[dict[str, Any]]:
    """All ways for one vocabulary, and how far they are from the dense loss in fp32."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, device="cuda").mul_(0.02).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    exact = exact_gradients(hidden, weight, targets)
    rows = []
    for name, way in ways().items():

        def run(way: Any = way) -> Tensor:
            hidden.grad = weight.grad = None
            with torch.autocast("cuda", torch.bfloat16):
                loss: Tensor = way(hidden, weight, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        try:
            loss = run()
            errors = [relative(one.grad, other) for one, other in zip((hidden, weight), exact[1:], strict=True)]
            hidden.grad = weight.grad = None
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            times = [synchronized(run) for _ in range(5)]
        except Exception as error:  # One way that fails must not take the others along.
            print(f"{name} at {vocabulary}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        rows.append(
            {
                "vocabulary": vocabulary,
                "way": name,
                "ms": statistics.median(times) * 1000,
                "gib": peak,
                "loss_gap": abs(float(loss) - exact[0]),
                "grad_errors": errors,
            }
        )
        print(rows[-1], flush=True)
    return rows


def exact_gradients(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[float, Tensor, Tensor]:
    """Loss and gradients in fp32, in chunks so that they fit."""
    wide, own = hidden.detach().float().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = linear_cross_entropy(wide, own, targets, chunk_tokens=1024)
    loss.backward()  # type: ignore[no-untyped-call]
    assert wide.grad is not None
    assert own.grad is not None
    return float(loss.detach()), wide.grad, own.grad


def relative(found: Tensor | None, exact: Tensor) -> float:
    """The norm of the difference, over that of the exact one."""
    assert found is not None
    return float((found.float() - exact).norm() / exact.norm())


def main() -> None:
    """Measure, and print JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[32_000, 64_000, 128_000, 256_000])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=2048)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here.")
    rows = [row for size in args.vocabularies for row in measure(size, args.tokens, args.width)]
    print(json.dumps({"name": "loss", "tokens": args.tokens, "width": args.width, "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
