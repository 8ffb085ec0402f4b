"""Cross entropy of a linear layer's output, computed a few tokens at a time: the logits never exist as a whole.

The logits of 16,384 tokens over a vocabulary of 128,000 take 4 GB in bf16 and 8 GB in fp32, and their gradient as much
again. Here the gradients of hidden states and weight are computed in the forward, chunk by chunk, and only scaled in
the backward: as many matrix products as in the dense loss, and memory for the logits of one chunk.

torch 2.13 has `torch.nn.functional.linear_cross_entropy`. It is not used: it returns the loss of bf16 inputs in bf16,
which is off by up to 0.4 %, accumulates the weight's gradient in bf16, and knows neither label smoothing in chunks nor
z-loss, soft-capping or a count of targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import override

from paceline.errors import PacelineError
from paceline.nn.softmax_kernel import has_kernel, losses_and_gradients

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]

Reduction = Literal["mean", "sum", "none"]

# A chunk has about this many logits, 0.25 GB in bf16: 4096 tokens of a vocabulary of 32,000. With fewer than 2048
# tokens, adding a chunk's share to the weight's gradient takes a tenth of the time and more.
_CHUNK_LOGITS = 2**27
_MIN_CHUNK_TOKENS = 2048


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    num_items_in_batch: Tensor | float | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Compute `cross_entropy(linear(hidden, weight, bias), targets)` without the memory for all logits.

    Under autocast the matrix products run in its dtype, as those of `linear` would. Softmax, loss and the accumulation
    of the weight's gradient are in fp32 (fp64 for fp64 inputs). Where `torch.compile` traces the call, the dense loss
    is traced. Only first derivatives exist.

    Under FSDP2 and ZeRO-3, call it inside the forward of the module that owns the weight, where the weight is whole.

    Args:
        hidden: Shape [..., features].
        weight: Shape [classes, features], in the dtype of `hidden` unless autocast is enabled.
        targets: Class indices, shape [...].
        bias: Shape [classes].
        reduction: `mean` over the targets that are not ignored, `sum`, or `none` for the loss of each target.
        ignore_index: A target that has no loss.
        label_smoothing: Probability mass spread over all classes, from 0 to 1.
        z_loss: Adds this times the squared log-sum-exp of the logits to the loss of each target.
        logit_scale: Multiplies the logits.
        softcap: Replaces logits x by `softcap * tanh(x / softcap)`, after the scale.
        num_items_in_batch: Divides the sum of the losses in place of their number, for a batch that is spread over
            several calls; only with `reduction="mean"`.
        chunk_tokens: Tokens in a chunk; None chooses them by the number of classes.

    Returns:
        The loss in fp32, or fp64 for fp64 inputs: shape [], or that of `targets` with `reduction="none"`.

    Raises:
        PacelineError: Shapes, dtypes or settings do not fit together, or the weight is sharded.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
        >>> loss = linear_cross_entropy(hidden, weight, torch.randint(100, (2, 5)))
        >>> loss.backward()
        >>> weight.grad.shape
        torch.Size([100, 8])
    """
    settings = _Settings(
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_scale=logit_scale,
        softcap=softcap,
        chunk_tokens=chunk_tokens or max(_MIN_CHUNK_TOKENS, _CHUNK_LOGITS // max(1, weight.shape[0])),
        compute_dtype=_compute_dtype(hidden),
    )
    _check(hidden, weight, targets, bias, settings, num_items_in_batch)
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if torch.compiler.is_compiling():
        losses = _dense(flat, weight, bias, flat_targets, settings)
        total = losses if reduction == "none" else losses.sum()
    else:
        total = _ChunkedLoss.apply(flat, weight, bias, flat_targets, settings)  # type: ignore[no-untyped-call]
    if reduction == "none":
        return total.reshape(targets.shape)
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    return total / flat_targets.ne(ignore_index).sum() if reduction == "mean" else total


class LinearCrossEntropy(nn.Linear):
    """A linear layer that returns its cross entropy when it gets targets, and its logits when it does not.

    It has the parameters of `nn.Linear`, so it can replace the head of a language model under the same name. Under
    FSDP2 and ZeRO-3 its weight is whole inside its own forward, so it also works as a unit of its own.

    Args:
        in_features: Size of a hidden state.
        out_features: Number of classes.
        bias: Whether there is a bias.
        settings: Further arguments of `linear_cross_entropy`.

    Example:
        >>> head = LinearCrossEntropy(8, 100, z_loss=1e-4)
        >>> hidden = torch.randn(2, 5, 8)
        >>> head(hidden).shape, head(hidden, torch.randint(100, (2, 5))).shape
        (torch.Size([2, 5, 100]), torch.Size([]))
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, **settings: Any) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.settings = settings

    @override
    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, num_items_in_batch: Tensor | float | None = None
    ) -> Tensor:
        """Compute the loss.

        Args:
            hidden: Shape [..., in_features].
            targets: Class indices, shape [...]; None for logits.
            num_items_in_batch: See `linear_cross_entropy`.

        Returns:
            The loss, or logits of shape [..., out_features] as the loss sees them.
        """
        if targets is None:
            logits = super().forward(hidden)
            return _transformed(logits, self.settings.get("logit_scale", 1.0), self.settings.get("softcap"))
        return linear_cross_entropy(
            hidden, self.weight, targets, self.bias, num_items_in_batch=num_items_in_batch, **self.settings
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What does not need a gradient."""

    reduction: Reduction
    ignore_index: int
    label_smoothing: float
    z_loss: float
    logit_scale: float
    softcap: float | None
    chunk_tokens: int
    compute_dtype: torch.dtype

    @property
    def loss_dtype(self) -> torch.dtype:
        return torch.float64 if self.compute_dtype is torch.float64 else torch.float32

    @property
    def scales_first(self) -> bool:
        """Whether the gradient of the logits must contain the loss scale before it is rounded."""
        return self.compute_dtype is torch.float16

    @property
    def is_plain(self) -> bool:
        """Whether the gradient of a logit is its probability, less one for the target."""
        return not (self.label_smoothing or self.z_loss or self.transforms or self.scales_first)

    @property
    def transforms(self) -> bool:
        return self.logit_scale != 1.0 or self.softcap is not None


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which `linear` would multiply."""
    return torch.get_autocast_dtype(hidden.device.type) if _is_autocast(hidden) else hidden.dtype


def _is_autocast(hidden: Tensor) -> bool:
    """Whether autocast converts the inputs of `linear`; it leaves fp64 as it is."""
    return hidden.dtype is not torch.float64 and torch.is_autocast_enabled(hidden.device.type)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    settings: _Settings,
    num_items: Tensor | float | None,
) -> None:
    """Refuse what does not fit together.

    Raises:
        PacelineError: It says what.
    """
    seen = f"linear_cross_entropy got hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}"
    if hasattr(weight, "placements") or (weight.numel() == 0 and hasattr(weight, "ds_id")):
        raise PacelineError(
            "linear_cross_entropy was called with a sharded weight",
            "It multiplies with the whole weight, which exists only inside the forward of the module that owns it",
            "Compute the loss in the forward of the prepared model, or use paceline.nn.LinearCrossEntropy as its head",
        )
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise PacelineError(
            seen,
            "The last dimension of both must be the number of features",
            "Pass the weight as nn.Linear has it, [classes, features]",
        )
    if targets.shape != hidden.shape[:-1] or targets.is_floating_point():
        raise PacelineError(
            f"{seen} and targets {tuple(targets.shape)} of {targets.dtype}",
            "Each hidden state needs one class index",
            "Shift labels before the call, and pass integers of shape hidden.shape[:-1]",
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise PacelineError(
            f"{seen} and bias {tuple(bias.shape)}",
            "Each class needs one value",
            f"Pass a bias of shape ({weight.shape[0]},)",
        )
    _check_settings(hidden, weight, settings, num_items)


def _check_settings(hidden: Tensor, weight: Tensor, settings: _Settings, num_items: Tensor | float | None) -> None:
    if weight.dtype != hidden.dtype and not _is_autocast(hidden):
        raise PacelineError(
            f"linear_cross_entropy got hidden in {hidden.dtype} and weight in {weight.dtype}",
            "A matrix product needs one dtype, and autocast is off",
            "Convert one of them, or call it under autocast",
        )
    if num_items is not None and settings.reduction != "mean":
        raise PacelineError(
            f"linear_cross_entropy got num_items_in_batch and reduction={settings.reduction!r}",
            "num_items_in_batch is what the mean divides by",
            "Leave one of them out",
        )
    if settings.reduction not in ("mean", "sum", "none") or not 0 <= settings.label_smoothing <= 1:
        raise PacelineError(
            f"linear_cross_entropy got reduction={settings.reduction!r}, label_smoothing={settings.label_smoothing}",
            "The reduction is mean, sum or none, and smoothing is a share of 1",
            "Correct them",
        )


def _transformed(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _dense(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings) -> Tensor:
    """The losses of single targets, with all logits at once."""
    logits = F.linear(hidden, weight, bias).to(settings.loss_dtype)
    logits = _transformed(logits, settings.logit_scale, settings.softcap)
    losses = F.cross_entropy(
        logits,
        targets,
        ignore_index=settings.ignore_index,
        label_smoothing=settings.label_smoothing,
        reduction="none",
    )
    if settings.z_loss:
        squares = logits.logsumexp(-1).square() * targets.ne(settings.ignore_index)
        losses = losses + settings.z_loss * squares
    return losses


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss, with its gradients computed in the forward; or the loss of each target.

    The gradient of a sum is known in the forward up to one factor. For single losses it is not, nor in fp16, where
    small gradients need the scale of the loss before they are rounded: then the backward computes the logits again.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Compute the loss; the inputs are those of `_Chunks`."""
        hidden, weight, bias, targets, settings = inputs
        ctx.settings = settings
        ctx.save_for_backward(hidden, weight, bias, targets)
        needed = ctx.needs_input_grad[:3]
        is_single = settings.reduction == "none"
        computes_gradients = any(needed) and not is_single and not settings.scales_first
        chunks = _Chunks(hidden, weight, bias, targets, settings)
        losses, ctx.gradients = chunks.run(needed if computes_gradients else (False, False, False), None)
        if not computes_gradients:
            ctx.gradients = None
        return losses if is_single else losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients, or compute them."""
        hidden, weight, bias, targets = ctx.saved_tensors
        needed, factor = ctx.needs_input_grad[:3], upstream[0]
        # Given away by the first backward, which scales them in place; another one computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            chunks = _Chunks(hidden, weight, bias, targets, ctx.settings)
            _, gradients = chunks.run(needed, factor.expand(targets.shape[0]))
        else:
            gradients = tuple(None if g is None else g.mul_(factor) for g in gradients)
        owners = (hidden, weight, bias)
        cast = (None if g is None else g.to(owner.dtype) for g, owner in zip(gradients, owners, strict=True))
        return (*cast, None, None)


class _Chunks:
    """One pass over the tokens, a chunk at a time."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> None:
        dtype = settings.compute_dtype
        self.hidden = hidden.detach()
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.targets = targets
        self.settings = settings

    def run(self, needed: tuple[bool, ...], upstream: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Compute the loss of every target, and the needed gradients of hidden, weight and bias.

        Args:
            needed: Of which of the three.
            upstream: The gradient of each loss, shape [tokens]; None is one.

        Returns:
            Losses of shape [tokens], and the gradients: of hidden states in the dtype of the products, of the others
            in that of the loss.
        """
        settings, size = self.settings, self.settings.chunk_tokens
        losses = self.hidden.new_empty(self.targets.shape, dtype=settings.loss_dtype)
        gradients = self._allocate(needed)
        # The dtype is chosen here already; autocast would cast the weight once more for every chunk.
        with torch.autocast(self.hidden.device.type, enabled=False):
            for start in range(0, len(losses), size):
                rows = slice(start, start + size)
                hidden = self.hidden[rows].to(settings.compute_dtype)
                losses[rows], of_logits = self._chunk(hidden, self.targets[rows], any(needed))
                if of_logits is not None:
                    factor = self.targets[rows].ne(settings.ignore_index).to(settings.loss_dtype)
                    factor = factor if upstream is None else factor * upstream[rows]
                    self._accumulate(gradients, rows, hidden, of_logits, factor[:, None])
        return losses, gradients

    def _allocate(self, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        settings = self.settings
        of_hidden, of_weight, of_bias = needed
        return (
            self.hidden.new_empty(self.hidden.shape, dtype=settings.compute_dtype) if of_hidden else None,
            self.weight.new_zeros(self.weight.shape, dtype=settings.loss_dtype) if of_weight else None,
            self.weight.new_zeros(self.weight.shape[:1], dtype=settings.loss_dtype) if of_bias else None,
        )

    def _chunk(self, hidden: Tensor, targets: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The losses of a chunk, and the gradients of its logits as if no target was ignored."""
        settings = self.settings
        logits = F.linear(hidden, self.weight, self.bias)
        if not (settings.transforms or settings.scales_first) and has_kernel(logits.device, logits.dtype):
            losses = losses_and_gradients(
                logits,
                targets,
                ignore_index=settings.ignore_index,
                label_smoothing=settings.label_smoothing,
                z_loss=settings.z_loss,
                needs_gradient=needs_gradient,
            )
            return losses, logits if needs_gradient else None
        return self._with_torch(logits, targets, needs_gradient)

    def _with_torch(self, logits: Tensor, targets: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """What the kernel computes, where there is none, and with transformed logits."""
        settings = self.settings
        smoothing, z_loss, dtype = settings.label_smoothing, settings.z_loss, settings.loss_dtype
        if settings.transforms:
            logits = _transformed(logits.to(dtype), settings.logit_scale, settings.softcap)
        # One kernel reads bf16 and writes fp32.
        log_probabilities = F.log_softmax(logits, dim=-1, dtype=dtype)
        ignored = targets.eq(settings.ignore_index)
        index = targets.masked_fill(ignored, 0)[:, None]
        of_target = log_probabilities.gather(1, index)
        log_sum = logits.gather(1, index).to(dtype) - of_target
        losses = of_target[:, 0].neg()
        if smoothing:
            losses = losses * (1 - smoothing) - smoothing * log_probabilities.mean(-1)
        if z_loss:
            losses = losses + z_loss * log_sum[:, 0].square()
        losses = losses.masked_fill(ignored, 0.0)
        if not needs_gradient:
            return losses, None
        if settings.is_plain:
            # The plain loss, with as little traffic as possible: the gradient is rounded once and replaces the logits.
            gradient = torch.exp(log_probabilities, out=logits)
            return losses, gradient.scatter_(1, index, of_target.exp().sub_(1.0).to(gradient.dtype))
        return losses, self._gradient(logits, log_probabilities, log_sum, index)

    def _gradient(self, logits: Tensor, log_probabilities: Tensor, log_sum: Tensor, index: Tensor) -> Tensor:
        """The gradient of the logits before scale and cap, in place of the log probabilities."""
        settings = self.settings
        smoothing, z_loss = settings.label_smoothing, settings.z_loss
        gradient = log_probabilities.exp_()
        if z_loss:
            gradient.mul_(1 + 2 * z_loss * log_sum)
        if smoothing:
            gradient.sub_(smoothing / gradient.shape[1])
        gradient.scatter_add_(1, index, gradient.new_full(index.shape, smoothing - 1.0))
        if settings.softcap is not None:
            gradient.mul_(1 - (logits / settings.softcap).square())
        return gradient.mul_(settings.logit_scale) if settings.logit_scale != 1.0 else gradient

    def _accumulate(
        self, gradients: tuple[Tensor | None, ...], rows: slice, hidden: Tensor, of_logits: Tensor, factor: Tensor
    ) -> None:
        """Add a chunk's share; `factor`, shape [tokens, 1], is the gradient of each loss."""
        of_hidden, of_weight, of_bias = gradients
        if self.settings.scales_first:
            of_logits, factor = of_logits.mul_(factor), torch.ones_like(factor)
        if of_bias is not None:
            of_bias.add_((of_logits.to(of_bias.dtype).t() @ factor)[:, 0])
        of_logits = of_logits.to(self.settings.compute_dtype)
        # Each row's factor goes to the narrow matrices, which costs less than a pass over the logits.
        if of_hidden is not None:
            torch.mul(of_logits @ self.weight, factor, out=of_hidden[rows])
        if of_weight is not None:
            _add_product(of_weight, of_logits.t(), (hidden * factor).to(hidden.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product to `total`, in the dtype of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda" and _adds_wider(total.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)


@lru_cache
def _adds_wider(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a 16-bit product to an fp32 matrix without rounding it, which cuBLAS can."""
    total = torch.ones(16, 16, device=device)
    ones = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool(total.eq(17).all())
