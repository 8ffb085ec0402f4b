"""`dynamo_backend="auto"`: compiled blocks train as eager ones do, and whatever speaks against them is said.

By default it acts on CUDA only, and compiles with inductor. Here the same code runs on the CPU, with the backend that
runs what was traced as it is.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from paceline import Accelerator
from paceline.config import FullyShardedDataParallelPlugin, TorchDynamoPlugin
from paceline.strategies import automatic_compilation
from tests.support.compilation import compiling_at_once
from tests.support.engines import needs_deepspeed
from tests.support.models import TinyTransformer, make_tokens, token_losses
from tests.support.ranks import run_on_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

STEPS = 16


class Breaks(nn.Module):
    """A block whose forward is two graphs."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        out: torch.Tensor = self.block(x)
        return out


def on_the_cpu(**changes: Any) -> AbstractContextManager[None]:
    """Let `auto` act here, and keep what it compiles."""
    return compiling_at_once(**({"DEVICE_TYPES": ("cpu",), "BACKEND": "eager"} | changes))


def train(
    strategy: str,
    make: Callable[[], Any] = TinyTransformer,
    length: Callable[[int], int] = lambda step: 9,
    steps: int = STEPS,
    scheduled: int | None = None,
    evaluate: bool = False,
    recompute: bool = False,
    free: bool = False,
    **settings: Any,
) -> tuple[list[float], str, Any]:
    """Losses, what is said about the compiler, and the user's own model."""
    if recompute:
        settings["fsdp_plugin"] = FullyShardedDataParallelPlugin(activation_checkpointing=True)
    accelerator = Accelerator(cpu=True, strategy=strategy, **settings)
    model: Any = make()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    if scheduled is not None:
        accelerator.prepare(torch.optim.lr_scheduler.LinearLR(optimizer.optimizer, 1.0, 1.0, total_iters=scheduled))
    losses = []
    for i in range(steps):
        model.train()
        tokens = make_tokens(4, length(i), seed=i)[accelerator.process_index :: accelerator.num_processes]
        loss = token_losses(model(tokens), tokens).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(make_tokens(3, 5 + i % 3))
    said = [line for line in accelerator.describe().splitlines() if "torch.compile" in line]
    inner = accelerator.unwrap_model(model)
    if free:
        accelerator.free_memory()
    return losses, "\n".join(said), inner


def on_rank(strategy: str, recompute: bool) -> None:
    plain, said, model = train(strategy, recompute=recompute)
    assert said == "", "nothing is compiled on a CPU"
    names = list(model.state_dict())
    with on_the_cpu():
        losses, said, model = train(strategy, evaluate=True, recompute=recompute)
        assert "3 " in said
        assert "compiled by eager; a step takes" in said, said
        assert all(block._compiled_call_impl is not None for block in model.blocks)
        assert list(model.state_dict()) == names
        counters: Any = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] >= 1
    assert losses == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(
    ("strategy", "ranks", "recompute"), [("single", 1, False), ("ddp", 2, False), ("fsdp", 2, False), ("fsdp", 2, True)]
)
def test_compiled_steps_equal_eager_ones(strategy: str, ranks: int, recompute: bool) -> None:
    run_on_ranks(ranks, on_rank, strategy, recompute)


def broken() -> Any:
    model: Any = TinyTransformer()
    model.blocks = nn.ModuleList(Breaks(block) for block in model.blocks)
    return model


def failing(graph: Any, inputs: Any) -> Any:
    raise ValueError("no such kernel")


def without_blocks() -> Any:
    model: Any = TinyTransformer(layers=1)
    return model


def compiled_by_hand() -> Any:
    model: Any = TinyTransformer()
    for block in model.blocks:
        block.compile(backend="eager")
    return model


class InPlace(torch.autograd.Function):
    """Doubles, in place on its output: before torch 2.13, compiled code had no gradient for it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = x * 1
        out += x
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> torch.Tensor:
        return upstream[0] * 2


class Doubles(nn.Module):
    """A block with such a function."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = InPlace.apply(self.block(x)) / 2  # type: ignore[no-untyped-call]
        return out


def with_functions() -> Any:
    model: Any = TinyTransformer()
    model.blocks = nn.ModuleList(Doubles(block) for block in model.blocks)
    return model


def in_place_functions() -> None:
    plain, _, _ = train("single", with_functions)
    with on_the_cpu():
        losses, said, _ = train("single", with_functions)
    assert losses == pytest.approx(plain, abs=1e-5)
    loses = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)
    assert ("would lose gradients" in said) == loses, said
    settings = TorchDynamoPlugin(backend="eager", use_regional_compilation=True)
    if loses:
        with pytest.raises(Exception, match="changes its output in place"):
            train("single", with_functions, dynamo_plugin=settings)
    else:
        assert train("single", with_functions, dynamo_plugin=settings)[0] == pytest.approx(plain, abs=1e-5)


def test_functions_that_work_in_place_keep_their_gradients() -> None:
    run_on_ranks(1, in_place_functions)


def after_zero3() -> None:
    import deepspeed.runtime.zero.linear as replacement

    plain, _, _ = train("single")
    original: Any = torch.nn.functional.linear
    torch.nn.functional.linear = replacement.zero3_linear_wrap
    graphs = []

    def watching(graph: Any, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    try:
        with on_the_cpu(BACKEND=watching):
            losses, said, _ = train("single")
    finally:
        torch.nn.functional.linear = original
    assert "compiled by" in said, said
    assert losses == pytest.approx(plain, abs=1e-5)
    assert graphs
    assert not any("autograd_function" in graph for graph in graphs), "DeepSpeed's own linear was compiled"


@needs_deepspeed
def test_a_linear_that_zero3_left_behind_is_not_compiled() -> None:
    run_on_ranks(1, after_zero3)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a graph break": ({"make": broken}, {}, "cannot be traced as one graph"),
    "a compiler that fails": ({}, {"BACKEND": failing}, "the compiler failed with BackendCompilerFailed"),
    "no gain": ({}, {"_WORTHWHILE_RATIO": 0.0}, "of an eager one"),
    "a short run": ({"scheduled": 20}, {"_COLD_SECONDS": 1e6}, "would not earn back"),
    "no blocks": ({"make": without_blocks}, {}, "no repeated blocks"),
    "compiled by hand": ({"make": compiled_by_hand}, {}, "the script compiles blocks itself"),
}


def in_case(case: str) -> None:
    arguments, changes, words = CASES[case]
    plain, _, _ = train("single", **arguments)
    with on_the_cpu(**changes):
        losses, said, _ = train("single", **arguments)
    assert "not compiled: " in said
    assert words in said, said
    assert losses == pytest.approx(plain, abs=1e-6)


# In a process of its own, where dynamo's warnings are no errors.
@pytest.mark.parametrize("case", CASES)
def test_what_speaks_against_compiling_is_said_and_changes_no_number(case: str) -> None:
    run_on_ranks(1, in_case, case)


def test_a_reason_on_one_rank_alone_disturbs_nobody() -> None:
    run_on_ranks(2, failing_on_one)


def failing_on_one() -> None:
    plain, _, _ = train("ddp")
    rank = int(torch.distributed.get_rank())
    with on_the_cpu(**({"BACKEND": failing} if rank else {})):
        losses, said, _ = train("ddp")
    assert ("not compiled" in said) == bool(rank)
    assert losses == pytest.approx(plain, abs=1e-5)


def large_blocks_under_ddp() -> None:
    graphs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    with on_the_cpu(BACKEND=counting):
        train("ddp", make=partial(TinyTransformer, width=512))
    assert len(graphs) == 1, "torch divides graphs at DDP's buckets, the first of which is one MB"


def test_a_block_under_ddp_is_one_graph() -> None:
    run_on_ranks(2, large_blocks_under_ddp)


def test_shapes_that_keep_changing_go_back_to_eager() -> None:
    run_on_ranks(1, with_changing_shapes)


def with_changing_shapes() -> None:
    def length(step: int) -> int:
        return 5 + step

    plain, _, _ = train("single", length=length)
    limit, torch._dynamo.config.recompile_limit = torch._dynamo.config.recompile_limit, 4
    try:
        with on_the_cpu(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            losses, said, _ = train("single", length=length)
            assert "compiled again too often" in said, said
        with on_the_cpu():
            dynamic, said, _ = train("single", length=length)
            assert "compiled by" in said, said
    finally:
        torch._dynamo.config.recompile_limit = limit
    assert losses == pytest.approx(plain, abs=1e-6)
    assert dynamic == pytest.approx(plain, abs=1e-5)


def hooked_late(strategy: str) -> None:
    with on_the_cpu():
        accelerator = Accelerator(cpu=True, strategy=strategy)
        model: Any = TinyTransformer()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
        model, optimizer = accelerator.prepare(model, optimizer)
        seen: list[int] = []
        for step in range(STEPS):
            if step == STEPS - 3:
                assert "3 Block compiled by" in accelerator.describe()
                inner: Any = accelerator.unwrap_model(model)
                layer = next(one for one in inner.blocks[1].modules() if isinstance(one, nn.Linear))
                layer.register_forward_hook(lambda *_, step=step: seen.append(step))
            tokens = make_tokens(4, 9, seed=step)
            accelerator.backward(token_losses(model(tokens), tokens).mean())
            optimizer.step()
            optimizer.zero_grad()
    assert len(seen) == 3, seen


@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("fsdp", 2)])
def test_a_hook_that_is_added_after_compiling_is_called(strategy: str, ranks: int) -> None:
    run_on_ranks(ranks, hooked_late, strategy)


def compiled_for_too_many_shapes() -> None:
    def length(step: int) -> int:
        return 5 + step

    plain, _, _ = train("single", length=length)
    # Each compilation counts, and takes longer than what is left of a short run.
    with on_the_cpu(_COMPILING_SECONDS=0.0), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        losses, said, _ = train("single", length=length, scheduled=STEPS)
        assert "compiling for more of them would not be earned back" in said, said
    assert losses == pytest.approx(plain, abs=1e-6)


def test_a_short_run_does_not_compile_for_every_shape() -> None:
    run_on_ranks(1, compiled_for_too_many_shapes)


def one_after_the_other() -> None:
    limit, torch._dynamo.config.recompile_limit = torch._dynamo.config.recompile_limit, 2
    try:
        with on_the_cpu():
            for width in (8, 16, 24, 32):
                _, said, model = train("single", make=partial(TinyTransformer, width), free=True)
                assert "compiled by" in said, said
                assert all(block._compiled_call_impl is None for block in model.blocks)
    finally:
        torch._dynamo.config.recompile_limit = limit


def test_models_of_one_process_do_not_use_up_the_compilations_of_others() -> None:
    run_on_ranks(1, one_after_the_other)


@pytest.mark.parametrize("settings", [{"dynamo_backend": "no"}, {"dynamo_plugin": TorchDynamoPlugin(disable=True)}])
def test_one_setting_forbids_it(settings: dict[str, Any]) -> None:
    with on_the_cpu():
        _, said, model = train("single", steps=9, **settings)
    assert said == ""
    assert all(block._compiled_call_impl is None for block in model.blocks)


def test_an_error_of_the_model_stays_the_error_of_the_model() -> None:
    class Late(TinyTransformer):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            if tokens.shape[1] == 4:
                raise ValueError("too short")
            return super().forward(tokens)

    with on_the_cpu(), pytest.raises(ValueError, match="too short"):
        train("single", Late, length=lambda step: 4 if step == 12 else 9)


def test_the_decision_is_said_before_it_is_taken() -> None:
    with on_the_cpu():
        _, said, _ = train("single", steps=2)
    assert "3 Block will be compiled after 7 steps if the run is long enough (dynamo_backend: auto)" in said


# Graphs: on the CPU, the same code without them.


class Checkpointed(TinyTransformer):
    """Its blocks are computed again in the backward."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) * self.scale
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class Interleaved(TinyTransformer):
    """A forward comes between two backwards, as with a generator and a discriminator."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        waiting = super().forward(tokens)
        between: Any = super().forward(tokens).mean()
        between.backward()
        other: torch.Tensor = super().forward(tokens)
        return other + 0 * waiting


class Watched(TinyTransformer):
    """A script keeps what a layer inside of a block returns."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"norm2": torch.zeros(())}
        for block in self.blocks:
            block.get_submodule("norm2").register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, result: torch.Tensor) -> None:
        self.kept["norm2"] = result.detach()


GRAPHED_STEPS = 24
GRAPHS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a gain": ({}, {}, "compiled by eager and replayed as CUDA graphs; a step takes"),
    "no gain": ({}, {"_WORTHWHILE_GRAPHS": 0.0}, "not replayed as CUDA graphs: a step takes"),
    "recomputed": ({"make": Checkpointed}, {}, "not replayed as CUDA graphs: activations are computed again"),
    "recomputed inside of the backward": (
        {"make": partial(Checkpointed, reentrant=True)},
        {},
        "not replayed as CUDA graphs: activations are computed again",
    ),
    "a forward between two backwards": (
        {"make": Interleaved},
        {},
        "not replayed as CUDA graphs: a forward comes before the backward",
    ),
    "hooks": ({"make": Watched}, {}, "not replayed as CUDA graphs: a forward hook"),
    "shapes that vary": ({"length": lambda step: 5 + step}, {}, "not replayed as CUDA graphs: shapes vary"),
    "forbidden": ({"dynamo_plugin": TorchDynamoPlugin(cuda_graphs=False)}, {}, "compiled by eager; a step"),
    "little memory": ({}, {"has_memory_for_graphs": lambda device: False}, "compiled by eager; a step"),
}


def graphed(case: str) -> None:
    arguments, changes, words = GRAPHS[case]
    plain, _, _ = train("single", steps=GRAPHED_STEPS, **(arguments | {"dynamo_plugin": None}))
    with on_the_cpu(**{"_WORTHWHILE_GRAPHS": 1e9, **changes}):
        losses, said, model = train("single", steps=GRAPHED_STEPS, **arguments)
    assert words in said, said
    assert losses == pytest.approx(plain, abs=1e-5)
    hooked = {bool(parameter._backward_hooks) for parameter in model.blocks.parameters()}
    assert hooked == {"and replayed" in said}, "gradients are copied while graphs are replayed, and no longer"


@pytest.mark.parametrize("case", GRAPHS)
def test_what_speaks_against_graphs_leaves_compiled_blocks(case: str) -> None:
    run_on_ranks(1, graphed, case)


def prepared_again() -> None:
    with on_the_cpu(_WORTHWHILE_GRAPHS=1e9):
        _, said, model = train("single", steps=GRAPHED_STEPS)
        assert "and replayed" in said, said
        _, said, _ = train("single", make=lambda: model, steps=1)
        assert "3 Block will be compiled after 7 steps" in said, said
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert all(block._compiled_call_impl is None for block in model.blocks)


def test_a_model_that_is_prepared_again_begins_anew() -> None:
    run_on_ranks(1, prepared_again)


def test_an_error_of_recording_ends_graphs_and_one_of_the_block_is_raised() -> None:
    model = TinyTransformer()
    compilation = automatic_compilation.AutomaticCompilation(
        list(model.blocks), TorchDynamoPlugin(), torch.device("cpu"), lambda: None
    )
    compilation._eager_seconds = compilation._compiled_seconds = 1.0
    with pytest.raises(RuntimeError, match="sizes differ"):
        compilation.note_failed_replay(RuntimeError("sizes differ"))
    compilation.note_failed_replay(RuntimeError("CUDA error: operation not permitted when stream is capturing"))
    assert "not replayed as CUDA graphs: RuntimeError: CUDA error" in compilation.state


def sharded_and_graphed() -> None:
    with on_the_cpu(_WORTHWHILE_GRAPHS=1e9):
        _, said, _ = train("fsdp", steps=GRAPHED_STEPS)
    assert "compiled by eager; a step takes" in said, said


def test_sharded_weights_move_and_are_not_replayed() -> None:
    run_on_ranks(2, sharded_and_graphed)


def stopped_late() -> None:
    with on_the_cpu(_WORTHWHILE_GRAPHS=1e9):
        _, said, model = train("single", steps=32, length=lambda step: 9 if step < 23 else step - 18)
    assert "not replayed as CUDA graphs: shapes vary" in said, said
    assert not any(parameter._backward_hooks for parameter in model.blocks.parameters())


def test_graphs_that_stop_after_they_were_kept_leave_no_hooks() -> None:
    run_on_ranks(1, stopped_late)
