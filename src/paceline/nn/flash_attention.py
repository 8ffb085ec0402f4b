"""The kernels of the package flash-attn-4 behind torch's `scaled_dot_product_attention`, while somebody uses them.

torch chooses between cuDNN's kernels and those of FlashAttention 2. In place of both, calls with large inputs go to the
newer kernels where these compute the same; all others stay with torch. Forward and backward on an H200 in bf16, batch
4, sequence 4096, causal: 463 TFLOP/s instead of cuDNN's 381 with heads of 64, and 541 instead of 510 with heads of 128.

Source of the kernels: https://github.com/Dao-AILab/flash-attention (flash_attn/cute).
"""

from __future__ import annotations

import importlib
import logging
import warnings
import weakref
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import library

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["PACKAGE", "FlashAttention", "unusable_reason"]

# Of every rank: the package may fail on one of them alone.
_LOG = logging.getLogger(__name__)

PACKAGE = "flash-attn-4"
_MODULE = "flash_attn.cute"
# Compute capabilities whose forward and backward the package has.
_MAJORS = (9, 10)
_MAX_WIDTH = 128
# Batch x heads x queries x keys x width of a head. Below, the host's 0.4 ms of two launches are more than what is
# gained: 8 x 16 x 2048 x 2048 x 64 gained 5 %.
_MIN_PRODUCTS = 2**33


def unusable_reason(device: torch.device) -> str | None:
    """Why the kernels cannot be used.

    Args:
        device: Where attention is computed.

    Returns:
        One line; None where they can.
    """
    if device.type != "cuda":
        return f"they compute on CUDA, not on {device.type}"
    if torch.cuda.get_device_capability(device)[0] not in _MAJORS:
        return f"they need a GPU of compute capability {' or '.join(f'{major}.x' for major in _MAJORS)}"
    if not hasattr(library, "get_kernel"):
        return f"torch {torch.__version__} cannot replace a kernel and keep the original; 2.10 can"
    return None if _installed_version() is not None else f"the package {PACKAGE} is not installed"


def _installed_version() -> str | None:
    """The version of the package; looking for its module would import all of FlashAttention 2, if that is installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


class FlashAttention:
    """The kernels in place of torch's, in the whole process, from the first user to the last `release`.

    Example:
        >>> import torch
        >>> device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        >>> if unusable_reason(device) is None:
        ...     kernels = FlashAttention()
        ...     kernels.release()
    """

    _registrations: Any = None
    _num_users = 0

    def __init__(self) -> None:
        FlashAttention._num_users += 1
        if FlashAttention._registrations is None:
            FlashAttention._registrations = _replace_kernels()
        self._leave = weakref.finalize(self, FlashAttention._remove_user)
        self._leave.atexit = False

    def release(self) -> None:
        """Give torch its own kernels back once nobody else uses these."""
        self._leave()

    @classmethod
    def _remove_user(cls) -> None:
        cls._num_users -= 1
        if not cls._num_users:
            # They are undone when they are collected.
            cls._registrations = None

    @staticmethod
    def describe() -> str:
        """Describe in one line which kernels there are."""
        kernels = f"{PACKAGE} {_installed_version()}"
        return f"{kernels} for large inputs without a mask or dropout, else torch's kernels"


def takes(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, *, is_causal: bool) -> bool:
    """Whether the kernels compute what torch does, and pay.

    Forward and backward must decide alike, so it depends on nothing but shapes and dtypes.

    Args:
        query: Shape [batch, heads, queries, width].
        key: Shape [batch, key heads, keys, width].
        value: Shape [batch, key heads, keys, width].
        dropout_p: The kernels have no dropout.
        is_causal: torch's mask begins at the first key and theirs ends at the last one: the same for as many queries
            as keys.
    """
    if dropout_p or query.dim() != 4 or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    has_same_mask = not is_causal or queries == keys
    pays = batch * heads * queries * keys * width >= _MIN_PRODUCTS
    return has_same_mask and pays and width <= _MAX_WIDTH and width % 8 == 0 and _fit(query, key, value)


def _fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether keys and values are those of a query, for each of its heads or for groups of them."""
    if key.shape != value.shape or not query.dtype == key.dtype == value.dtype:
        return False
    batch, key_heads, _, width = key.shape
    is_of_query = batch == query.shape[0] and width == query.shape[3]
    return is_of_query and key_heads > 0 and query.shape[1] % key_heads == 0


class _Kernels:
    """Forward and backward of tensors [batch, heads, sequence, width]; None where torch's kernels must do it."""

    def __init__(self) -> None:
        self._interface: Any = None
        self._has_failed = False

    def forward(
        self, inputs: tuple[Tensor, Tensor, Tensor], dropout_p: float, scale: float | None, *, is_causal: bool
    ) -> tuple[Tensor, Tensor] | None:
        """The output, and the logarithms of the sums in fp32 of shape [batch, heads, queries]."""
        if self._has_failed or not takes(*inputs, dropout_p, is_causal=is_causal):
            return None
        # Laid out as by torch's kernels, which compiled code relies on.
        output = torch.empty_like(inputs[0])
        found = self._call(
            "_flash_attn_fwd", inputs, softmax_scale=scale, causal=is_causal, return_lse=True, out=_turned(output)
        )
        return None if found is None else (output, found[1].contiguous())

    def backward(
        self,
        gradient: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        results: tuple[Tensor, Tensor],
        dropout_p: float,
        scale: float | None,
        *,
        is_causal: bool,
    ) -> tuple[Tensor, ...] | None:
        """The gradients of the inputs. What the forward returned suits torch's kernels as well."""
        if self._has_failed or not takes(*inputs, dropout_p, is_causal=is_causal):
            return None
        output, log_sums = results
        gradients = tuple(torch.empty_like(one) for one in inputs)
        query_gradient, key_gradient, value_gradient = map(_turned, gradients)
        found = self._call(
            "_flash_attn_bwd",
            (*inputs, output, gradient),
            log_sums.reshape(output.shape[:3]),
            softmax_scale=scale,
            causal=is_causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dq=query_gradient,
            dk=key_gradient,
            dv=value_gradient,
        )
        return None if found is None else gradients

    def _call(self, name: str, inputs: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        """Call a function of the package; after its first error never again."""
        try:
            if self._interface is None:
                self._interface = importlib.import_module(f"{_MODULE}.interface")
            return getattr(self._interface, name)(*map(_turned, inputs), *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        # A package of another version, and a compiler that fails, have errors of every kind.
        except Exception as error:
            self._has_failed = True
            _LOG.warning("%s is no longer used: %s: %s", PACKAGE, type(error).__name__, error)
            return None


def _turned(tensor: Tensor) -> Tensor:
    """From torch's order of heads and sequence to the package's, or back."""
    return tensor.transpose(1, 2)


def _replace_kernels() -> Any:
    """Replace torch's two pairs of kernels until what is returned is collected."""
    registrations: Any = library.Library("aten", "IMPL", "CUDA")  # type: ignore[no-untyped-call]
    kernels = _Kernels()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*overrid", category=UserWarning)
        for name, make in _REPLACED.items():
            original = library.get_kernel(f"aten::{name}", "CUDA")
            registrations.impl(name, make(kernels, original), "CUDA", with_keyset=True, allow_override=True)
    return registrations


# What torch calls: the signatures are those of its native functions. Random states are those of dropout, which there
# is none of, and the limits of sequences those of nested tensors.


def _cudnn_forward(kernels: _Kernels, original: Any) -> Callable[..., Any]:
    def forward(  # type: ignore[no-untyped-def]
        keys, query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
        return_debug_mask=False, *, scale=None,
    ):  # fmt: skip
        found = None
        if attn_bias is None and not return_debug_mask:
            found = kernels.forward((query, key, value), dropout_p, scale, is_causal=is_causal)
        if found is None:
            return original.call_boxed(
                keys, query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask,
                scale=scale,
            )  # fmt: skip
        output, log_sums = found
        nothing = query.new_empty((), dtype=torch.long)
        return output, log_sums.unsqueeze(-1), None, None, query.shape[2], key.shape[2], nothing, nothing.clone(), None

    return forward


def _cudnn_backward(kernels: _Kernels, original: Any) -> Callable[..., Any]:
    def backward(  # type: ignore[no-untyped-def]
        keys, grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k,
        max_q, max_k, dropout_p, is_causal, *, scale=None,
    ):  # fmt: skip
        found = None
        if attn_bias is None:
            inputs, results = (query, key, value), (out, logsumexp)
            found = kernels.backward(grad_out, inputs, results, dropout_p, scale, is_causal=is_causal)
        if found is not None:
            return found
        return original.call_boxed(
            keys, grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q,
            cum_seq_k, max_q, max_k, dropout_p, is_causal, scale=scale,
        )  # fmt: skip

    return backward


def _flash_forward(kernels: _Kernels, original: Any) -> Callable[..., Any]:
    def forward(  # type: ignore[no-untyped-def]
        keys, query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
    ):
        found = None
        if not return_debug_mask:
            found = kernels.forward((query, key, value), dropout_p, scale, is_causal=is_causal)
        if found is None:
            return original.call_boxed(keys, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale)
        random_state = query.new_empty(2, dtype=torch.uint64)
        offset, mask = query.new_empty((), dtype=torch.uint64), query.new_empty(0)
        return *found, None, None, query.shape[2], key.shape[2], random_state, offset, mask

    return forward


def _flash_backward(kernels: _Kernels, original: Any) -> Callable[..., Any]:
    def backward(  # type: ignore[no-untyped-def]
        keys, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        philox_seed, philox_offset, *, scale=None,
    ):  # fmt: skip
        inputs, results = (query, key, value), (out, logsumexp)
        found = kernels.backward(grad_out, inputs, results, dropout_p, scale, is_causal=is_causal)
        if found is not None:
            return found
        return original.call_boxed(
            keys, grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
            is_causal, philox_seed, philox_offset, scale=scale,
        )  # fmt: skip

    return backward


_REPLACED = {
    "_scaled_dot_product_cudnn_attention": _cudnn_forward,
    "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
    "_scaled_dot_product_flash_attention": _flash_forward,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
}
