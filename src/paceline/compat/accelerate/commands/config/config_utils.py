"""What the parsers of `accelerate config` share."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["DYNAMO_BACKENDS", "SubcommandHelpFormatter"]

DYNAMO_BACKENDS = [
    "EAGER",
    "AOT_EAGER",
    "INDUCTOR",
    "AOT_TS_NVFUSER",
    "NVPRIMS_NVFUSER",
    "CUDAGRAPHS",
    "OFI",
    "FX2TRT",
    "ONNXRT",
    "TENSORRT",
    "AOT_TORCHXLA_TRACE_ONCE",
    "TORCHXLA_TRACE_ONCE",
    "TVM",
]


class SubcommandHelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves the place of a subcommand out of a usage line."""

    def _format_usage(self, *args: Any) -> str:
        return super()._format_usage(*args).replace("<command> [<args>] ", "")
