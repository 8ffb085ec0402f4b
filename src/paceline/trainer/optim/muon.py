"""Muon for the matrices of a model, and AdamW for everything else, as one optimizer.

Muon orthogonalizes the update of a whole matrix. Under FSDP2 a rank has some of its rows, so the updates are gathered,
in bf16, in which they are orthogonalized anyway; momentum and weights stay sharded, and the result is that of one rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from paceline.errors import ConfigError
from paceline.trainer.argument_errors import field_problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

__all__ = ["MuonAdamW", "muon_groups"]

# Keller Jordan's polynomial: its slope at zero is as large as possible, and five steps suffice.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_SCALES = ("match_rms_adamw", "original")


class MuonAdamW(Optimizer):
    """Muon where a group says `muon`, and AdamW elsewhere; both with the same learning rate.

    With `adjust_lr_fn="match_rms_adamw"` an update of Muon is as large as one of AdamW typically is. With `original` it
    is as in `torch.optim.Muon`, which wants larger learning rates.

    Args:
        params: Groups, each with `muon`, which is True for matrices only.
        lr: Learning rate.
        weight_decay: Decoupled, as in AdamW.
        momentum: Of Muon.
        nesterov: Whether Muon's momentum looks ahead.
        ns_steps: Steps of the Newton-Schulz iteration.
        adjust_lr_fn: How Muon's learning rate depends on the shape: `match_rms_adamw` or `original`.
        betas: Of AdamW.
        eps: Of AdamW.

    Raises:
        ConfigError: `adjust_lr_fn` is something else.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if adjust_lr_fn not in _SCALES:
            raise ConfigError(
                [field_problem("optim_args", f"adjust_lr_fn={adjust_lr_fn}", hint=f"write {' or '.join(_SCALES)}")]
            )
        of_muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "muon": False, **of_muon}
        )
        # It steps those of the groups that are its own, with the state of this optimizer.
        self._adam = AdamW([torch.zeros(1)])
        self._adam_defaults = {**self._adam.param_groups[0], "params": []}

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters. Collective under FSDP2: every rank must call it.

        Args:
            closure: Computes the loss again.

        Returns:
            What the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group)
        self._adam.param_groups = [_filled_up(g, self._adam_defaults) for g in self.param_groups if not g["muon"]]
        # Both may have been replaced by `load_state_dict`.
        self._adam.state = self.state
        if self._adam.param_groups:
            self._adam.step()
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        gradient, momentum = _local(parameter.grad), group["momentum"]
        buffer = _local(state["momentum_buffer"])
        buffer.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
        orthogonal = _rows_of(orthogonalize(_whole(update.bfloat16(), parameter), group["ns_steps"]), parameter)
        weight = _local(parameter)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(orthogonal, alpha=-group["lr"] * _scale(parameter.shape, group["adjust_lr_fn"]))


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Bring the singular values of a matrix close to one, by a Newton-Schulz iteration in bf16.

    Args:
        matrix: Shape [m, n].
        steps: Of the iteration.

    Returns:
        A matrix of the same shape, in bf16.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    if is_tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def _scale(shape: torch.Size, adjust_lr_fn: str) -> float:
    rows, columns = shape
    if adjust_lr_fn == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def _filled_up(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {**defaults, **group}


def _local(tensor: Any) -> Tensor:
    """This rank's part of a tensor; a whole one itself."""
    if not hasattr(tensor, "placements"):
        return tensor  # type: ignore[no-any-return]
    local: Tensor = tensor.to_local()
    # Of master weights, where FSDP2 gathers in fp8.
    inner: Tensor = getattr(local, "_tensor", local)
    return inner


def _whole(local: Tensor, parameter: Any) -> Tensor:
    """The whole matrix of which this rank has some rows. Collective if it is sharded."""
    if not hasattr(parameter, "placements"):
        return local
    from torch.distributed.tensor import DTensor

    whole: Tensor = DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    ).full_tensor()
    return whole


def _rows_of(whole: Tensor, parameter: Any) -> Tensor:
    """This rank's rows of a whole matrix."""
    if not hasattr(parameter, "placements"):
        return whole
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return whole[offset[0] : offset[0] + shape[0], offset[1] : offset[1] + shape[1]]


def muon_groups(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split groups into matrices and the rest.

    Matrices are the weights of layers inside the model. Embeddings and the output layer, whose rows are tokens or
    classes, and vectors, are left to AdamW.

    Args:
        model: Of the parameters.
        groups: By weight decay.

    Returns:
        Groups with `muon`; empty ones are left out.
    """
    matrices = _matrices(model)
    found = []
    for group in groups:
        for is_muon in (True, False):
            chosen = [p for p in group["params"] if (id(p) in matrices) == is_muon]
            if chosen:
                found.append({**group, "params": chosen, "muon": is_muon})
    return found


def _matrices(model: nn.Module) -> set[int]:
    modules = list(model.modules())
    weights = [(module, getattr(module, "weight", None)) for module in modules]
    found = {id(weight) for _, weight in weights if isinstance(weight, nn.Parameter) and weight.ndim == 2}
    embedded = {id(weight) for module, weight in weights if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    return found - embedded - {id(p) for output in _outputs(modules) for p in output.parameters()}


def _outputs(modules: list[nn.Module]) -> list[nn.Module]:
    """The output layers that modules name, else the last linear layer."""
    named = [output for output in map(_output_of, modules) if output is not None]
    linears: list[nn.Module] = [module for module in modules if isinstance(module, nn.Linear)]
    return named or linears[-1:]


def _output_of(module: nn.Module) -> nn.Module | None:
    method = getattr(module, "get_output_embeddings", None)
    output = method() if callable(method) else None
    return output if isinstance(output, nn.Module) else None
