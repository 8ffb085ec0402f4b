"""Which losses `backward` accepts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from paceline.errors import SteppingError

__all__ = ["scalar_loss"]


def scalar_loss(loss: Any, gradient: Tensor | None = None) -> Tensor:
    """The scalar to differentiate.

    PyTorch refuses a loss of several values only where no first gradient is given, and a window of several
    micro-batches gives one. So the shape is checked here, before any strategy sees the loss.

    Args:
        loss: Shape [], or one value of any shape; with `gradient` any shape.
        gradient: As in `Tensor.backward`: a weight for each value of the loss, of the same shape.

    Returns:
        A real number, shape [].

    Raises:
        SteppingError: It is not a real number, and `gradient` does not make it one; or it has no gradient.
    """
    if not isinstance(loss, Tensor):
        raise SteppingError(
            f"backward() got a {type(loss).__name__}",
            "Only a tensor can be differentiated",
            "Pass the loss itself, such as model(**batch).loss",
        )
    if gradient is not None:
        return _weighted_sum(loss, gradient)
    scalar = _only_value(loss) if loss.ndim else loss
    if scalar.dtype.is_complex:
        raise SteppingError(
            f"backward() got a loss of dtype {loss.dtype}",
            "Grad can be implicitly created only for real scalar outputs",
            "Pass a real number, such as loss.abs() or loss.real",
        )
    if not scalar.requires_grad:
        raise SteppingError(
            "backward() got a loss that depends on no trainable parameter: element 0 of tensors does not require grad",
            "The forward ran under torch.no_grad(), the loss was detached, or all parameters are frozen",
            "Compute the loss where gradients are recorded, and do not detach it",
        )
    return scalar


def _only_value(loss: Tensor) -> Tensor:
    """The one value of a loss that has dimensions, shape []."""
    if loss.numel() != 1:
        raise SteppingError(
            f"backward() got a loss of shape {[*loss.shape]}",
            "Grad can be implicitly created only for scalar outputs: the mean and the sum of "
            f"{loss.numel()} values have different gradients",
            "Pass loss.mean(), or loss.sum() with weight=loss.numel()",
        )
    return loss.reshape(())


def _weighted_sum(loss: Tensor, gradient: Tensor) -> Tensor:
    """A scalar with the gradient of `loss.backward(gradient)`."""
    if gradient.shape != loss.shape:
        raise SteppingError(
            f"backward() got a loss of shape {[*loss.shape]} and a gradient of shape {[*gradient.shape]}",
            "The gradient holds a weight for each value of the loss",
            "Give them the same shape",
        )
    return (loss * gradient.detach()).sum()
