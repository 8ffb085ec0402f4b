"""`dynamo_backend="auto"`: compiles the repeated blocks of a model once that pays, and stops where it does not.

The first optimizer steps run eagerly and are timed. Then the blocks are compiled in place if the rest of the run is
long enough, and the next steps are timed as well. Where the host is the limit even so, the blocks are replayed as CUDA
graphs, and the steps after that are timed too. Whatever speaks against compiling (a graph break, too many
recompilations, a compiler that fails, no gain) puts the blocks back to eager, in the middle of a forward if need be,
with one line of reason; what speaks against graphs, back to compiled code. Steps are numbered, so a run that is
repeated compiles in the same step.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import time
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from paceline.environment.logging import get_logger
from paceline.strategies.blocks import class_name, repeated_blocks
from paceline.strategies.compilation import LostGradientsError, compiler_arguments
from paceline.strategies.compile_cache import known_seconds, note_seconds, torch_cache_folder
from paceline.strategies.cuda_graphs import (
    GRAPH_OPTIONS,
    MAX_SHAPES,
    Replayed,
    has_hooks,
    has_memory_for_graphs,
    may_be_recomputed,
    would_overwrite,
)
from paceline.strategies.step_timer import TIMED_STEPS, StepTimer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from paceline.config import TorchDynamoPlugin

__all__ = ["AutomaticCompilation", "automatic_compilation"]

_LOG = get_logger(__name__)

# Where a default may compile. On a CPU, inductor needs a compiler and minutes for gains that are small.
DEVICE_TYPES = ("cuda",)
BACKEND = "inductor"

# Optimizer steps that allocate and tune.
_IGNORED = 2
# What compiled blocks take of an eager step if nothing is known: 0.75 under FSDP2, 0.5 where the host is the limit.
_EXPECTED_RATIO = 0.75
_WORTHWHILE_RATIO = 0.97
# Graphs keep memory for themselves, so they must gain more. Blocks run once to warm up, once to be recorded, and in the
# third step as a graph.
_WORTHWHILE_GRAPHS = 0.9
_IGNORED_FOR_GRAPHS = 4
# Compiling forward and backward of one block of a Llama: 14 s on 16 cores.
_COLD_SECONDS = 20.0
# Longer than any call that only queues kernels, shorter than any that compiles.
_COMPILING_SECONDS = 0.5
_COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx", "triton")


def automatic_compilation(
    model: nn.Module,
    settings: TorchDynamoPlugin,
    device: torch.device,
    remaining_steps: Callable[[], int | None],
    *,
    at_once: bool = False,
    may_replay: bool = False,
) -> AutomaticCompilation | None:
    """Choose what to compile of a model, if the device is one where that is done by default.

    Args:
        model: As it will be trained.
        settings: Of the compiler.
        device: Where it will be trained.
        remaining_steps: Returns the optimizer steps that are left; None if that is unknown.
        at_once: Whether the model must be compiled, however long the run is.
        may_replay: Whether the weights stay where they are in memory, as CUDA graphs need it.

    Returns:
        To be told of every optimizer step; None where models stay as they are.
    """
    if device.type not in DEVICE_TYPES:
        return None
    blocks = [model.get_submodule(name) for name in repeated_blocks(model)]
    for block in blocks:
        if isinstance(block._compiled_call_impl, _CompiledCall):
            block._compiled_call_impl.owner.end("the model was prepared again")
    compilation = AutomaticCompilation(blocks, settings, device, remaining_steps, may_replay=may_replay)
    if not blocks:
        compilation.stop("the model has no repeated blocks")
    elif any(block._compiled_call_impl is not None for module in blocks for block in module.modules()):
        compilation.stop("the script compiles blocks itself")
    elif at_once:
        compilation.start_at_once()
    return compilation


class AutomaticCompilation:
    """The blocks of one model, and how far the decision is.

    Args:
        blocks: All of one structure, or of a few.
        settings: Of the compiler.
        device: Where the blocks compute.
        remaining_steps: See `automatic_compilation`.
        may_replay: See `automatic_compilation`.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        settings: TorchDynamoPlugin,
        device: torch.device,
        remaining_steps: Callable[[], int | None],
        *,
        may_replay: bool = False,
    ) -> None:
        self._blocks = blocks
        self._settings = settings
        self._device = device
        self._remaining_steps = remaining_steps
        self._may_replay = may_replay
        self._timer = StepTimer(device, _IGNORED + 1)
        # What is done with the time of a step.
        self._judge: Callable[[float], None] = self._judge_eager
        self._eager_seconds = self._compiled_seconds = 0.0
        # When compiling began, and what the first step took that did.
        self._started = self._compile_seconds = 0.0
        self._recompilations = _Recompilations()
        self._state = f"will be compiled after {_IGNORED + TIMED_STEPS + 1} steps if the run is long enough"
        self._replayed: list[Replayed] = []
        self._shapes: set[torch.Size] = set()
        # Whether forwards use compiled code; off, they stay eager from the next step on.
        self.is_on = False
        # Whether they replay graphs of it.
        self.is_replayed = False
        self.is_decided = False

    @property
    def state(self) -> str:
        """How far it is, or why it stopped."""
        return self._state

    def describe(self) -> str:
        """Describe in one line what is compiled, or why nothing is."""
        counts = Counter(map(class_name, self._blocks))
        what = " + ".join(f"{count} {name}" for name, count in counts.items())
        return f"torch.compile: {what + ' ' if what else ''}{self._state} (dynamo_backend: auto)"

    def stepped(self) -> None:
        """Take note of an optimizer step, and decide where it is time to."""
        if self._replayed and not self.is_replayed:
            # Only now: graphs that had run forward when they were stopped still ran backward.
            self._end_replayed()
            return
        if self.is_on and not self._compile_seconds:
            self._compile_seconds = time.perf_counter() - self._started
            self._recompilations.begin()
        elif self._recompilations.are_new:
            self._judge_recompilations()
        seconds = self._timer.stepped()
        if seconds is not None:
            self._judge(seconds)

    def stop(self, reason: str) -> None:
        """Use no compiled code from the next step on."""
        was_on, self.is_on, self.is_decided = self.is_on, False, not self._replayed
        self._state = f"not compiled: {reason}"
        if was_on:
            _LOG.info("Blocks are not compiled any longer: %s", reason)

    def end(self, reason: str) -> None:
        """Leave the blocks as they were, and let the next models of their classes be compiled as often as the first."""
        self.stop(reason)
        self._end_replayed()
        self._restore()
        if not self._started:
            return
        from torch._C._dynamo.eval_frame import reset_code

        for code in {_code(block) for block in self._blocks}:
            reset_code(code)

    def stop_graphs(self, reason: str) -> None:
        """Call compiled code without graphs from the next block on."""
        self.is_replayed, self.is_decided = False, not self._replayed
        self._state = f"{self._compiled_state}; not replayed as CUDA graphs: {reason}"
        _LOG.info("Compiled blocks are not replayed as CUDA graphs: %s", reason)

    @property
    def has_pending_graphs(self) -> bool:
        """Whether graphs were stopped in this step, and the backward of one is still to come."""
        return bool(self._replayed) and not self.is_replayed and would_overwrite()

    def may_replay_now(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a block may be a graph with these arguments; if not, graphs are stopped."""
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, torch.Tensor):
            self._shapes.add(first.shape)
        if len(self._shapes) > MAX_SHAPES:
            self.stop_graphs("shapes vary")
        elif may_be_recomputed():
            self.stop_graphs("activations are computed again in the backward")
        elif would_overwrite():
            self.stop_graphs("a forward comes before the backward of an earlier one")
        return self.is_replayed

    def note_failed_replay(self, error: RuntimeError) -> None:
        """Stop graphs if the error comes from recording or replaying them; raise it if it is the block's own."""
        is_compiler = type(error).__module__.startswith(_COMPILERS)
        is_recording = "CUDAGraph" in str(error) or "captur" in str(error)
        if not (is_compiler or isinstance(error, torch.OutOfMemoryError) or is_recording):
            raise error
        self.stop_graphs(f"{type(error).__name__}: {_first_line(error)}"[:200])

    def _then(self, judge: Callable[[float], None], ignored: int) -> None:
        """Time steps again after the next ones."""
        self._judge = judge
        self._timer.restart(ignored)

    def _judge_eager(self, seconds: float) -> None:
        """Compile if that is earned back before the run ends."""
        self._eager_seconds = seconds
        remaining = self._remaining_steps()
        expected = known_seconds(self._key) or _COLD_SECONDS
        gain = (1 - _EXPECTED_RATIO) * self._eager_seconds
        if remaining is not None and remaining * gain < expected:
            self.stop(
                f"{remaining} more steps of {self._eager_seconds:.3g} s would not earn back "
                f"about {expected:.0f} s of compilation"
            )
            return
        self._state = "being compiled"
        self._compile()
        self._then(self._judge_compiled, _IGNORED)

    def start_at_once(self) -> None:
        """Compile from the first step on: the model is slower eagerly than before it was changed."""
        self.is_decided = True
        self._state = f"compiled by {BACKEND} from the first step on; code is kept in {torch_cache_folder()}"
        self._compile()

    def _compile(self) -> None:
        self.is_on = True
        self._started = time.perf_counter()
        # By default torch does not notice hooks that are added to layers after it has compiled them, and calls none.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        # With fullgraph, a graph break is an error, before anything has run.
        arguments = {**compiler_arguments(self._settings, BACKEND), "fullgraph": True}
        for block in self._blocks:
            block._compiled_call_impl = _CompiledCall(block, self, arguments)

    def _judge_compiled(self, seconds: float) -> None:
        """Keep the compiled blocks if steps have become shorter."""
        ratio = seconds / self._eager_seconds
        if ratio > _WORTHWHILE_RATIO:
            self.stop(f"a step takes {ratio:.2f} of an eager one")
            self._restore()
            return
        self._compiled_seconds = seconds
        self._state = self._compiled_state
        _LOG.info("Blocks are compiled: a step takes %.2f of an eager one", ratio)
        note_seconds(self._key, self._compile_seconds)
        self.is_decided = True
        if not (self._may_replay and self._timer.has_idled and has_memory_for_graphs(self._device)):
            return
        if has_hooks(self._blocks):
            self.stop_graphs("a forward hook inside of the blocks could keep what they overwrite")
            return
        self.is_decided = False
        self._replay()
        self._then(self._judge_graphs, _IGNORED_FOR_GRAPHS)

    def note_call(self, seconds: float) -> None:
        """Note how long the host was in a block's call: it may have compiled, or waited for a device that is behind."""
        if self._compile_seconds:
            self._recompilations.note(seconds)

    def _judge_recompilations(self) -> None:
        """Stop where compiling for further shapes, as long as for those so far, would not be earned back."""
        spent = self._recompilations.accept()
        remaining = self._remaining_steps()
        compiled = self._compiled_seconds or _EXPECTED_RATIO * self._eager_seconds
        gain = self._eager_seconds - compiled
        if remaining is not None and remaining * gain < spent and not self.is_replayed:
            self.stop(
                f"shapes vary, and compiling for more of them would not be earned back in {remaining} more steps "
                f"({spent:.0f} s so far)"
            )

    def _judge_graphs(self, seconds: float) -> None:
        """Keep the graphs if steps have become shorter again."""
        ratio = seconds / self._compiled_seconds
        if ratio > _WORTHWHILE_GRAPHS:
            self.stop_graphs(f"a step takes {ratio:.2f} of one without them")
            return
        self.is_decided = True
        of_eager = seconds / self._eager_seconds
        self._state = (
            f"compiled by {BACKEND} and replayed as CUDA graphs; a step takes {of_eager:.2f} of an eager one; "
            f"code is kept in {torch_cache_folder()}"
        )
        _LOG.info("Compiled blocks are replayed as CUDA graphs: a step takes %.2f of one without them", ratio)

    def _replay(self) -> None:
        self.is_replayed = True
        # Blocks share their code, which looks like one function that is called again before its backward.
        warnings.filterwarnings("ignore", message="Unable to hit fast path of CUDAGraphs")
        arguments = {**compiler_arguments(self._settings, BACKEND, GRAPH_OPTIONS), "fullgraph": True}
        for block in self._blocks:
            call: Any = block._compiled_call_impl
            self._replayed.append(call.replay(arguments))

    def _end_replayed(self) -> None:
        for replayed in self._replayed:
            replayed.end()
        self._replayed = []
        self.is_decided = True

    @property
    def _compiled_state(self) -> str:
        ratio = self._compiled_seconds / self._eager_seconds
        return (
            f"compiled by {BACKEND}; a step takes {ratio:.2f} of an eager one; code is kept in {torch_cache_folder()}"
        )

    def _restore(self) -> None:
        for block in self._blocks:
            if isinstance(block._compiled_call_impl, _CompiledCall):
                block._compiled_call_impl = None

    @functools.cached_property
    def _key(self) -> str:
        """Names what is compiled: a cache that another run has filled holds it under the same name."""
        first = self._blocks[0]
        shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in first.named_parameters()]
        device = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type
        parts = (torch.__version__, device, class_name(first), type(first).__module__, shapes, self._settings.mode)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


class _Recompilations:
    """The time that calls of blocks took which compiled once more, for further shapes."""

    def __init__(self) -> None:
        self._seconds = self._accepted = 0.0
        self._num_graphs = 0

    def begin(self) -> None:
        """Count what is compiled from now on."""
        self._num_graphs = _num_graphs()

    def note(self, seconds: float) -> None:
        """Note how long the host was in a block's call."""
        if seconds < _COMPILING_SECONDS:
            return
        num_graphs = _num_graphs()
        if num_graphs > self._num_graphs:
            self._seconds += seconds
        self._num_graphs = num_graphs

    @property
    def are_new(self) -> bool:
        """Whether there were any since they were accepted."""
        return self._seconds > self._accepted

    def accept(self) -> float:
        """Return the seconds of all so far."""
        self._accepted = self._seconds
        return self._seconds


class _CompiledCall:
    """What a block's `__call__` runs: its compiled code while that is on, and its own otherwise."""

    def __init__(self, block: nn.Module, owner: AutomaticCompilation, arguments: dict[str, Any]) -> None:
        self._block: Any = block
        self.owner = owner
        self._compiled: Callable[..., Any] = torch.compile(block._call_impl, **arguments)
        self._replayed: Replayed | None = None

    def replay(self, arguments: dict[str, Any]) -> Replayed:
        """Compile once more, to code that replays graphs."""
        self._replayed = Replayed(self._block, torch.compile(self._block._call_impl, **arguments))
        return self._replayed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block, owner = self._block, self.owner
        # Evaluations have other shapes, and would be compiled once more for a few batches.
        if not (owner.is_on and block.training and torch.is_grad_enabled()):
            return block._call_impl(*args, **kwargs)
        if self._replayed is not None and owner.is_replayed and owner.may_replay_now(args, kwargs):
            try:
                return self._replayed(args, kwargs)
            except RuntimeError as error:
                owner.note_failed_replay(error)
        if owner.has_pending_graphs:
            # Even compiled code without graphs begins a new generation of them, whose memory torch takes to be free.
            return block._call_impl(*args, **kwargs)
        started = time.perf_counter()
        try:
            result = self._compiled(*args, **kwargs)
            owner.note_call(time.perf_counter() - started)
            return result
        except Exception as error:
            if not type(error).__module__.startswith(_COMPILERS):
                raise
            owner.stop(_reason(error))
        return block._call_impl(*args, **kwargs)


def _num_graphs() -> int:
    """How many graphs torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _code(block: nn.Module) -> Any:
    """What torch keeps the compiled variants of a block's class under, at most eight of them."""
    forward: Any = type(block).forward
    return inspect.unwrap(forward).__code__


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def _reason(error: Exception) -> str:
    line = _first_line(error)
    kind = type(error).__name__
    if isinstance(getattr(error, "inner_exception", None), LostGradientsError):
        return f"torch {torch.__version__} would lose gradients of a torch.autograd.Function"
    match kind:
        case "Unsupported":
            return f"its forward cannot be traced as one graph ({line or kind})"
        case "FailOnRecompileLimitHit":
            return "it was compiled again too often, as happens when shapes vary"
        case _:
            return f"the compiler failed with {kind}: {line}"[:200]
