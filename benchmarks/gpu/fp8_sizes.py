"""From which size on a linear layer is faster in fp8: forward and backward of one, compiled, against bf16.

    python -m benchmarks.gpu.fp8_sizes

This is what decides which layers `mixed_precision="fp8"` leaves in bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from typing import Any

import torch
from benchmarks.gpu.training import synchronized
from torch import Tensor, nn

SIZES = [(512, 2048), (1024, 1024), (1024, 4096), (1024, 8192), (2048, 2048), (4096, 1024), (4096, 4096), (8192, 2048)]


def milliseconds(rows: int, columns: int, tokens: int, recipe: str | None) -> float:
    """Of forward and backward of a layer under autocast, compiled."""
    torch._dynamo.reset()
    layer: Any = nn.Sequential(nn.Linear(columns, rows, bias=False, device="cuda"))
    if recipe is not None:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        convert_to_float8_training(layer, config=Float8LinearConfig.from_recipe_name(recipe))
    layer.compile(dynamic=False)
    inputs = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(tokens, rows, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            out: Tensor = layer(inputs)
        out.backward(upstream)  # type: ignore[no-untyped-call]
        inputs.grad = layer[0].weight.grad = None

    for _ in range(3):
        step()
    times = [synchronized(partial(_several, step)) / 10 * 1000 for _ in range(5)]
    return statistics.median(times)


def _several(step: Any) -> None:
    for _ in range(10):
        step()


def main() -> None:
    """Measure, and print JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--recipes", nargs="*", default=["tensorwise", "rowwise"])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here.")
    rows = []
    for out, inner in SIZES:
        plain = milliseconds(out, inner, args.tokens, None)
        row: dict[str, Any] = {"rows": out, "columns": inner, "bf16": plain}
        row |= {recipe: milliseconds(out, inner, args.tokens, recipe) for recipe in args.recipes}
        rows.append(row)
        print(row, flush=True)
    print(json.dumps({"name": "fp8-sizes", "tokens": args.tokens, "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
