from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.errors import PacelineError
from paceline.nn import LinearCrossEntropy, linear_cross_entropy
from tests.support.engines import slowly

TOKENS, FEATURES, CLASSES = 23, 12, 37


def tensors(dtype: torch.dtype = torch.float64, **shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    tokens, features, classes = shape.get("tokens", TOKENS), FEATURES, shape.get("classes", CLASSES)
    hidden = torch.randn(tokens, features, dtype=dtype, requires_grad=True)
    weight = torch.randn(classes, features, dtype=dtype, requires_grad=True)
    bias = torch.randn(classes, dtype=dtype, requires_grad=True)
    targets = torch.randint(classes, (tokens,))
    targets[::5] = -100
    return hidden, weight, bias, targets


def dense(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, **settings: Any) -> Any:
    """The same, by torch, with all logits."""
    logits = F.linear(hidden, weight, bias)
    logits = logits.float() if logits.dtype is not torch.float64 else logits
    logits = logits * settings.get("logit_scale", 1.0)
    if settings.get("softcap"):
        logits = settings["softcap"] * torch.tanh(logits / settings["softcap"])
    smoothing, ignored = settings.get("label_smoothing", 0.0), settings.get("ignore_index", -100)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing, ignore_index=ignored)
    counts = targets.ne(ignored)
    losses = losses + settings.get("z_loss", 0.0) * logits.logsumexp(-1).square() * counts
    match settings.get("reduction", "mean"):
        case "none":
            return losses
        case "sum":
            return losses.sum()
    items = settings.get("num_items_in_batch")
    return losses.sum() / (counts.sum() if items is None else items)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "single": {"reduction": "none"},
    "smooth": {"label_smoothing": 0.1},
    "z": {"z_loss": 1e-2},
    "scaled": {"logit_scale": 0.25},
    "capped": {"softcap": 3.0},
    "counted": {"num_items_in_batch": 71},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "logit_scale": 2.0, "softcap": 5.0, "num_items_in_batch": 5},
    "all, single": {"label_smoothing": 0.2, "z_loss": 1e-3, "logit_scale": 2.0, "softcap": 5.0, "reduction": "none"},
    "another ignored class": {"ignore_index": 3},
}

COMBINED = ["plain", "all", "all, single"]


@pytest.mark.parametrize("chunk", [1, 5, 23, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_the_dense_ones(kind: str, chunk: int) -> None:
    settings = KINDS[kind]
    found: list[Any] = []
    expected: list[Any] = []
    for function, into in ((dense, expected), (linear_cross_entropy, found)):
        hidden, weight, bias, targets = tensors()
        if "ignore_index" in settings:
            targets = targets.masked_fill(targets < 0, 3)
        more: dict[str, Any] = {"chunk_tokens": chunk} if function is linear_cross_entropy else {}
        loss = function(hidden, weight, targets, bias, **settings, **more)
        upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        loss.backward(upstream)
        into += [loss.detach(), hidden.grad, weight.grad, bias.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


# The dense loss, which the other kinds are compared with, has torch's own gradients.
@pytest.mark.parametrize("kind", [*COMBINED, *slowly([kind for kind in KINDS if kind not in COMBINED])])
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    settings = KINDS[kind]
    hidden, weight, bias, targets = tensors(tokens=7, classes=9)
    if "ignore_index" in settings:
        targets = targets.masked_fill(targets < 0, 3)

    def loss(*inputs: Tensor) -> Tensor:
        return linear_cross_entropy(inputs[0], inputs[1], targets, inputs[2], chunk_tokens=3, **settings)

    # The second backward of a graph computes in another order.
    assert torch.autograd.gradcheck(loss, (hidden, weight, bias), nondet_tol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_narrow_dtypes_stay_within_their_precision(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    settings = KINDS[kind]
    results = []
    for function in (dense, linear_cross_entropy):
        hidden, weight, _, targets = tensors(dtype)
        if "ignore_index" in settings:
            targets = targets.masked_fill(targets < 0, 3)
        more: dict[str, Any] = {"chunk_tokens": 4} if function is linear_cross_entropy else {}
        loss = function(hidden, weight, targets, **settings, **more)
        loss.backward(torch.ones_like(loss))
        results.append((loss.detach(), hidden.grad, weight.grad))
    assert results[1][0].dtype is torch.float32
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(results[1][1:], results[0][1:], strict=True):
        assert ours is not None
        assert theirs is not None
        assert ours.dtype is dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_the_gradient_of_the_weight_is_accumulated_without_rounding() -> None:
    """64 chunks of bf16 with an fp32 weight: as near to the exact gradient as one product is."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2048, 16), torch.randn(50, 16)
    targets = torch.randint(50, (2048,))
    exact = weight.double().requires_grad_()
    dense(hidden.double(), exact, targets).backward()
    errors = {}
    for chunk in (32, 2048):
        ours = weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            linear_cross_entropy(hidden, ours, targets, chunk_tokens=chunk).backward()  # type: ignore[no-untyped-call]
        assert ours.grad is not None
        assert exact.grad is not None
        errors[chunk] = float((ours.grad - exact.grad).norm() / exact.grad.norm())
    assert errors[32] <= errors[2048] * 1.2
    assert errors[2048] < 5e-3


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float32")])
def test_autocast_takes_inputs_of_any_dtype(dtypes: tuple[str, str]) -> None:
    hidden, weight, bias, targets = tensors(torch.float32)
    inputs = [
        one.detach().to(getattr(torch, name)).requires_grad_()
        for one, name in zip((hidden, weight), dtypes, strict=True)
    ]
    losses = []
    for function in (dense, linear_cross_entropy):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(function(inputs[0], inputs[1], targets, bias))
    losses[1].backward()
    assert [str(one.grad.dtype) for one in inputs if one.grad is not None] == [f"torch.{name}" for name in dtypes]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


def test_small_gradients_survive_fp16_under_a_loss_scale() -> None:
    hidden, weight, _, targets = tensors(torch.float32)
    with torch.no_grad():
        # Nearly certain of every target, so that the gradients of the other classes are far below fp16.
        weight.zero_()
        hidden.zero_()
        weight[:, 0] = torch.arange(CLASSES, dtype=torch.float32)
        hidden[:, 0] = 0.75
        targets.fill_(CLASSES - 1)
    grads = []
    for function in (dense, linear_cross_entropy):
        weight.grad = None
        with torch.autocast("cpu", dtype=torch.float16):
            loss = function(hidden, weight, targets)
        (loss * 2.0**14).backward()
        gradient: Any = weight.grad
        grads.append(gradient[:, 0] / 2.0**14)
    assert int((grads[1] != 0).sum()) >= int((grads[0] != 0).sum())
    torch.testing.assert_close(grads[1], grads[0], rtol=5e-2, atol=1e-9)


def test_a_second_backward_gives_the_same_gradients() -> None:
    hidden, weight, _, targets = tensors()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    first = weight.grad.clone() if weight.grad is not None else None
    loss.backward()  # type: ignore[no-untyped-call]
    assert first is not None
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 2 * first)


def test_no_gradients_are_computed_for_what_needs_none() -> None:
    hidden, weight, bias, targets = tensors()
    linear_cross_entropy(hidden, weight.detach(), targets, bias.detach()).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_a_batch_without_targets_has_the_loss_that_torch_gives_it() -> None:
    hidden, weight, _, targets = tensors(torch.float32)
    targets.fill_(-100)
    assert linear_cross_entropy(hidden, weight, targets).isnan()
    counted = linear_cross_entropy(hidden, weight, targets, num_items_in_batch=10)
    counted.backward()  # type: ignore[no-untyped-call]
    assert counted.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_shapes_of_sequences_are_kept() -> None:
    hidden, weight, _, _ = tensors(tokens=24)
    targets = torch.randint(CLASSES, (2, 12))
    losses = linear_cross_entropy(hidden.view(2, 12, FEATURES), weight, targets, reduction="none")
    assert losses.shape == (2, 12)


def test_the_head_gives_logits_or_their_loss() -> None:
    torch.manual_seed(0)
    head = LinearCrossEntropy(FEATURES, CLASSES, softcap=3.0)
    hidden, targets = torch.randn(5, FEATURES), torch.randint(CLASSES, (5,))
    torch.testing.assert_close(head(hidden, targets), F.cross_entropy(head(hidden), targets))
    assert set(head.state_dict()) == {"weight"}


def test_a_traced_call_computes_the_dense_loss() -> None:
    hidden, weight, _, targets = tensors()
    compiled = torch.compile(linear_cross_entropy, backend="eager", fullgraph=True)
    loss = compiled(hidden, weight, targets, z_loss=1e-3)
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, targets, z_loss=1e-3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "one class index"),
        ({"targets": torch.zeros(TOKENS)}, "one class index"),
        ({"weight": torch.zeros(CLASSES, 3, dtype=torch.float64)}, "number of features"),
        ({"weight": torch.zeros(CLASSES, FEATURES)}, "one dtype"),
        ({"bias": torch.zeros(3)}, "one value"),
        ({"reduction": "sum", "num_items_in_batch": 3}, "divides by"),
        ({"reduction": "median"}, "mean, sum or none"),
        ({"label_smoothing": 1.5}, "share of 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(change: dict[str, Any], words: str) -> None:
    hidden, weight, _, targets = tensors()
    arguments: dict[str, Any] = {"hidden": hidden, "weight": weight, "targets": targets} | change
    with pytest.raises(PacelineError, match=words):
        linear_cross_entropy(**arguments)
