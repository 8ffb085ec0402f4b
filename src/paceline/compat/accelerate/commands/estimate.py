"""`accelerate estimate-memory`: the size of a model, built without memory for its weights.

`paceline estimate` tells more: training under each strategy, with gradients, optimizer state and activations.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from paceline.compat.accelerate.big_modeling import init_empty_weights
from paceline.compat.accelerate.commands.utils import command_parser, run_command
from paceline.compat.accelerate.settings.errors import InvalidValueError
from paceline.compat.accelerate.utils.imports import is_timm_available, is_transformers_available
from paceline.compat.accelerate.utils.modeling import calculate_maximum_sizes
from paceline.compat.accelerate.utils.other import convert_bytes
from paceline.errors import MissingExtraError

__all__ = [
    "add_timm_hub_prefix",
    "check_has_model",
    "create_ascii_table",
    "create_empty_model",
    "estimate_command",
    "estimate_command_parser",
    "estimate_training_usage",
    "gather_data",
    "main",
    "verify_on_hub",
]

_PART_OF_FLOAT32: Final = {"float32": 1, "float16": 2, "int8": 4, "int4": 8}
_LIBRARIES: Final = ("timm", "transformers")
_UNKNOWN: Final = -1


def verify_on_hub(repo: str, token: str | None = None) -> Any:
    """Look a model up on the Hub.

    Args:
        repo: Its name.
        token: A token for private models.

    Returns:
        What the Hub knows of it; "gated" where it may not be read, or the Hub not be reached; "repo" where there is
        no such model.
    """
    from huggingface_hub import model_info
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return model_info(repo, token=token)
    except GatedRepoError:
        return "gated"
    except RepositoryNotFoundError:
        return "repo"
    except OSError:
        return "gated"
    except Exception as error:
        # Without a connection: an error of the HTTP client, which differs between versions of the Hub's library.
        if any(kind.__name__ in ("TransportError", "RequestException") for kind in type(error).__mro__):
            return "gated"
        raise


def check_has_model(error: Exception) -> str:
    """Return the library that raised an error because a repository holds no model of it, or "unknown"."""
    text = str(error)
    # The Hub raises a kind of EntryNotFoundError, of a name that differs between versions of its library.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    has_no_model = (
        "EntryNotFoundError" in kinds,
        "Unknown model" in text,
        "KeyError" in kinds and "architecture" in text,
    )
    if is_timm_available() and any(has_no_model):
        return "timm"
    if isinstance(error, (OSError, ValueError)) and (
        "does not appear to have a file named" in text or "Unrecognized model in" in text
    ):
        return "transformers"
    return "unknown"


def add_timm_hub_prefix(model_name: str) -> str:
    """Write the name of a repository as timm wants it; names of architectures and those with a source stay."""
    is_repository = "/" in model_name and ":" not in model_name
    return f"hf-hub:{model_name}" if is_repository else model_name


def create_empty_model(
    model_name: str, library_name: str | None, trust_remote_code: bool = False, access_token: str | None = None
) -> nn.Module:
    """Build a model in float32 without memory for its weights.

    Args:
        model_name: Its name on the Hub, or a folder with its configuration.
        library_name: `transformers` or `timm`; None takes what the Hub says.
        trust_remote_code: Run code of the repository.
        access_token: A token for private models.

    Raises:
        OSError: There is no such model, it may not be read, or the Hub cannot be reached.
        InvalidValueError: It is unknown which library the model belongs to, or it belongs to another one.
        RuntimeError: The repository holds no model of the library.
    """
    info: Any = None
    if not Path(model_name).exists():
        info = _info(model_name, access_token)
        library_name = library_name or getattr(info, "library_name", None)
    elif library_name is None:
        library_name = "transformers"
    if library_name not in _LIBRARIES:
        raise InvalidValueError(
            f"The library of {model_name} is {library_name or 'unknown'}",
            "Models of transformers and timm can be built here",
            "Give --library_name, or use `paceline estimate package.module:function`, which takes any model",
        )
    if library_name == "timm":
        return _timm_model(model_name)
    if info is not None and info.config is None:
        raise RuntimeError(
            f"{model_name} has no configuration of transformers. No model can be built from it. Check the name."
        )
    return _transformers_model(model_name, info, trust_remote_code, access_token)


def _info(model_name: str, token: str | None) -> Any:
    info = verify_on_hub(model_name, token)
    if info == "gated":
        raise OSError(
            f"{model_name} cannot be read. It is gated, or the Hub cannot be reached. Log in with `hf auth login`, or "
            "name a folder with the model's configuration."
        )
    if info == "repo":
        raise OSError(f"There is no model {model_name} on the Hub, or it is private. Check the name, or log in.")
    return info


def _timm_model(model_name: str) -> nn.Module:
    if not is_timm_available():
        raise MissingExtraError(f"{model_name} is a model of timm", "timm is not installed", "pip install timm")
    import timm

    with init_empty_weights():
        model: nn.Module = timm.create_model(add_timm_hub_prefix(model_name), pretrained=False)
    return model


def _transformers_model(model_name: str, info: Any, trust_remote_code: bool, token: str | None) -> nn.Module:
    if not is_transformers_available():
        raise MissingExtraError(
            f"{model_name} is a model of transformers", "transformers is not installed", "pip install transformers"
        )
    import transformers

    read: Any = transformers.AutoConfig.from_pretrained
    config = read(model_name, trust_remote_code=trust_remote_code, token=token)
    classes = getattr(info, "config", None) or {}
    own = [name for name in classes.get("auto_map", {}) if name.startswith("AutoModelFor")]
    make: Any = getattr(transformers, own[0] if own else "AutoModel").from_config
    with init_empty_weights():
        # Else the dtype that the configuration names would be used.
        model: nn.Module = make(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return model


def create_ascii_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> str:
    """Draw a table.

    Args:
        headers: The heads of the columns.
        rows: The cells of each row.
        title: The line above all.
    """
    widths = [max(len(str(row[index])) for row in (headers, *rows)) for index in range(len(headers))]
    widths[-1] += max(len(title) - sum(widths) - len(widths) + 1, 0)

    def line(left: str, middle: str, right: str) -> str:
        return f"{left}{middle.join('─' * width for width in widths)}{right}"

    def cells(row: Sequence[str]) -> str:
        return f"│{'│'.join(str(cell).center(width) for cell, width in zip(row, widths, strict=True))}│"

    head = [line("┌", "─", "┐"), f"│{title.center(sum(widths) + len(widths) - 1)}│", line("├", "┬", "┤")]
    return "\n".join([*head, cells(headers), line("├", "┼", "┤"), *map(cells, rows), line("└", "┴", "┘")])


def estimate_command_parser(subparsers: Any = None) -> argparse.ArgumentParser:
    """Return the parser.

    Args:
        subparsers: Where to add it as the command `estimate-memory`, if it is one of several.
    """
    text = "Show the size of a model. `paceline estimate` also shows what training it takes, by strategy."
    parser = command_parser("estimate-memory", subparsers, description=text)
    parser.add_argument("model_name", help="Name of the model on the Hub, or a folder with its configuration.")
    parser.add_argument("--library_name", choices=_LIBRARIES, help="Its library, where the Hub does not know.")
    parser.add_argument(
        "--dtypes", nargs="+", default=list(_PART_OF_FLOAT32), choices=list(_PART_OF_FLOAT32), help="Dtypes to show."
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code of the repository.")
    parser.set_defaults(func=estimate_command)
    return parser


def estimate_training_usage(  # the name `bytes` is Accelerate's
    bytes: int,  # noqa: A002
    mixed_precision: str,
    msamp_config: str | None = None,
) -> dict[str, int]:
    """Estimate what training with Adam takes, without activations.

    Args:
        bytes: The size of the model in float32.
        mixed_precision: `float32`, `float16`, `bfloat16` or `fp8`.
        msamp_config: A level of MS-AMP, which is not estimated.

    Returns:
        Bytes of the model, its gradients, the optimizer, and the largest sum of them at one time; -1 where unknown.
    """
    if mixed_precision == "float32":
        return {"model": bytes, "optimizer": 2 * bytes, "gradients": bytes, "step": 4 * bytes}
    if mixed_precision in ("float16", "bfloat16") or (mixed_precision == "fp8" and msamp_config is None):
        # Gradients of the weights in float32, and the copies in half precision that were computed with.
        return {"model": bytes, "optimizer": 2 * bytes, "gradients": bytes + bytes // 2, "step": 2 * bytes}
    return dict.fromkeys(("model", "optimizer", "gradients", "step"), _UNKNOWN)


def gather_data(args: argparse.Namespace) -> list[list[Any]]:
    """Return for each dtype its name, the bytes of the largest layer, of the model, and of a training.

    Args:
        args: What the parser returned.

    Raises:
        RuntimeError: The repository holds no model of the library.
    """
    try:
        model = create_empty_model(args.model_name, args.library_name, trust_remote_code=args.trust_remote_code)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        library = check_has_model(error)
        if library == "unknown":
            raise
        raise RuntimeError(
            f"{args.model_name} was to be loaded with {library}. The repository holds no model of it. Check the name "
            "and --library_name."
        ) from error
    total, (largest, _) = calculate_maximum_sizes(model)
    return [
        [dtype, largest / part, total / part, estimate_training_usage(int(total), dtype)]
        for dtype, part in ((dtype, _PART_OF_FLOAT32[dtype]) for dtype in args.dtypes)
    ]


def estimate_command(args: argparse.Namespace) -> None:
    """Print the table.

    Args:
        args: What the parser returned.
    """
    rows = []
    for dtype, largest, total, training in gather_data(args):
        most = max(training.values())
        rows.append(
            [dtype, convert_bytes(largest), convert_bytes(total), "N/A" if most == _UNKNOWN else convert_bytes(most)]
        )
    heads = ["dtype", "Largest Layer", "Total Size", "Training using Adam"]
    print(create_ascii_table(heads, rows, f"Memory Usage for loading `{args.model_name}`"))


def main() -> None:
    """Run `accelerate estimate-memory`."""
    run_command(estimate_command, estimate_command_parser().parse_args())


if __name__ == "__main__":
    main()
