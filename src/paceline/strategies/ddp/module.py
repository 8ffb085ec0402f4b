"""DDP that tracks which gradients its reducer has averaged, and averages the others itself.

The reducer averages the gradients of the first backward after a forward of the wrapper, for parameters that required a
gradient when it was built. Whatever else autograd accumulates silently stays on its rank: a second backward through
the same forward, a forward that bypasses the wrapper, parameters unfrozen or added later. As the averaged part is the
same on all ranks, the mean over the ranks of the accumulated gradient is right in each of these cases.
"""

from __future__ import annotations

import re
from enum import Enum
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from paceline.environment.logging import get_logger
from paceline.errors import PrepareError, SteppingError, UnusedParametersError, named

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from paceline.collectives import Group

    Versions = list[tuple[int, int] | None]

_LOG = get_logger(__name__)
_flag_of = attrgetter("requires_grad")
# Gradients are averaged in chunks of this size, so that a big model needs no second copy of all of them.
_CHUNK_BYTES = 256 * 2**20


class _NextBackward(Enum):
    """What the next backward belongs to."""

    NOTHING = "no forward of the wrapper"
    EXCHANGE = "a forward whose gradients the reducer averages"
    NO_EXCHANGE = "a forward whose gradients stay on this rank for now"


class _Backwards:
    """Tracks the backwards since the last forward of the wrapper.

    It is itself the hook on one of the reducer's parameters, without a reference to the model: autograd stores hooks
    where the garbage collector does not see them.
    """

    def __init__(self) -> None:
        self.awaits = _NextBackward.NOTHING
        # Whether gradients may contain something that only this rank has.
        self.is_local = False

    def __call__(self, _parameter: Tensor) -> None:
        if self.awaits is _NextBackward.EXCHANGE:
            # The reducer waits for all of its parameters, so this one stands for all.
            self.awaits = _NextBackward.NOTHING
            self.is_local = False
        else:
            self.is_local = True


class NamingDDP(DistributedDataParallel):
    """DDP whose gradients are the same on all ranks in every case, and whose errors name parameters.

    Args:
        module: The user's own module.
        open_group: Returns a group of the same ranks for collectives outside of DDP. A rank that starts one without the
            others waits there, and does not disturb DDP's own.
        splits_graphs: Whether torch.compile divides graphs at the buckets, so that gradients are averaged while the
            rest of a compiled backward runs. A block is small enough as it is, and divided it becomes slower code.
        arguments: Of `DistributedDataParallel`.
    """

    def __init__(
        self, module: nn.Module, open_group: Callable[[], Group], *, splits_graphs: bool = True, **arguments: Any
    ) -> None:
        super().__init__(module, **arguments)
        self._open_group = open_group
        self._splits_graphs = splits_graphs
        self._backwards = _Backwards()
        self._sentinel: Any = None
        self._has_warned = False
        # Communication hooks that this library has registered; the script may add one.
        self.num_hooks = 0
        self._note_parameters()

    @override
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the module.

        Raises:
            UnusedParametersError: Parameters got no gradient in the previous step.
            PrepareError: `requires_grad` has changed under static_graph, or differently on different ranks.
        """
        if not torch.is_grad_enabled():
            return super().forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]
        flags = list(map(_flag_of, self._parameters_known))
        if flags != self._flags and any(flags):
            self._rebuild()
        if not any(flags):
            # Frozen as a whole, as a discriminator is while its generator learns: there is nothing to wait for.
            return self._call(False, inputs, kwargs)
        # static_graph keeps the graph of the first backward, which must average gradients; averaging once more
        # within a window changes no mean.
        exchanges = self.require_backward_grad_sync or self._keeps_graph_next
        try:
            output = self._call(exchanges, inputs, kwargs)
        except RuntimeError as error:
            unused = self._named_in(str(error))
            if unused is None:
                raise
            raise UnusedParametersError(unused) from error
        self._backwards.awaits = _NextBackward.EXCHANGE if exchanges else _NextBackward.NO_EXCHANGE
        return output

    def _run_ddp_forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if self._splits_graphs:
            return super()._run_ddp_forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]
        # DDP's own registers itself with the compiler around this call, and does nothing else.
        return self.module(*inputs, **kwargs)

    @property
    def _keeps_graph_next(self) -> bool:
        return self.static_graph and not self._static_graph_delay_allreduce_enqueued

    def _call(self, exchanges: bool, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """DDP's own forward, with or without averaging in the backward that follows."""
        before, self.require_backward_grad_sync = self.require_backward_grad_sync, exchanges
        try:
            return super().forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            self.require_backward_grad_sync = before

    # The parameters that the reducer knows

    def _note_parameters(self) -> None:
        ignored = set(self.parameters_to_ignore)
        known = [(name, p) for name, p in self.module.named_parameters() if name not in ignored]
        self._names_known = [name for name, _ in known]
        self._parameters_known = [p for _, p in known]
        self._flags = list(map(_flag_of, self._parameters_known))
        self.trained = [(name, p) for name, p in known if p.requires_grad]
        if self._sentinel is not None:
            self._sentinel.remove()
        self._sentinel = None
        if not self._uses_change:
            self._sentinel = self.trained[0][1].register_post_accumulate_grad_hook(self._backwards)

    @property
    def _uses_change(self) -> bool:
        """Whether a backward may skip parameters, so that no single one stands for all."""
        return bool(self.find_unused_parameters or self.static_graph)

    def invalidate_reducer(self) -> None:
        """Have the next forward rebuild the reducer, since parameters may have been added to the module."""
        self._flags = []

    def _rebuild(self) -> None:
        """Rebuild the reducer for the parameters that require a gradient now. Collective: every rank must call it."""
        before = {id(p): name for name, p in zip(self._names_known, self._parameters_known, strict=True)}
        trained = [name for name, p in self.module.named_parameters() if p.requires_grad]
        self._check_alike(trained)
        if self.static_graph:
            was = {name for name, _ in self.trained}
            changed = sorted(was.symmetric_difference(trained))
            raise PrepareError(
                f"{named(changed)} was frozen or unfrozen after the model was prepared with static_graph=True",
                "static_graph tells DDP that every step trains the same parameters",
                "Leave static_graph out, or freeze before prepare()",
            )
        new = [p for p in self.module.parameters() if id(p) not in before]
        with torch.no_grad():
            for parameter in new:
                self._open_group().broadcast(parameter)
        hooks = list(self._comm_hooks)
        self._comm_hooks.clear()
        # As DDP does after unpickling: it builds the reducer, and nothing else.
        self.__setstate__(self.__getstate__())  # type: ignore[no-untyped-call]
        for hook, state in hooks:
            if isinstance(state, PowerSGDState):
                _reset(state)
            self.register_comm_hook(state, hook)
        self._note_parameters()

    def _check_alike(self, trained: list[str]) -> None:
        all_trained = self._open_group().all_gather_object(trained)
        odd = [rank for rank, names in enumerate(all_trained) if names != all_trained[0]]
        if odd:
            differing = set(all_trained[0]).symmetric_difference(all_trained[odd[0]])
            raise PrepareError(
                f"{named(sorted(differing))} requires a gradient on rank 0 and not on rank {odd[0]}, or vice versa",
                "A gradient can only be averaged if every rank computes it",
                "Freeze and unfreeze the same parameters on all ranks",
            )

    # Which gradients were averaged

    def expect_exchange(self) -> None:
        """Average gradients in the next backward, whose forwards ran without: DDP prepares for it in a forward."""
        self.require_backward_grad_sync = True
        if self._backwards.awaits is _NextBackward.EXCHANGE:
            return
        self.reducer.prepare_for_backward([])
        self._backwards.awaits = _NextBackward.EXCHANGE

    def begin_backward(self) -> Versions | None:
        """Record the gradients' versions, if nothing else shows which of them the next backward changes.

        Returns:
            What `end_backward` must be given; None if the hook is enough.
        """
        awaits = self._backwards.awaits
        hook_is_enough = awaits is _NextBackward.NO_EXCHANGE or (
            awaits is _NextBackward.EXCHANGE and self._sentinel is not None
        )
        return None if hook_is_enough else self._versions()

    def end_backward(self, before: Versions | None) -> None:
        """Note which gradients the backward has changed, and average those that DDP did not.

        Args:
            before: What `begin_backward` returned.
        """
        backwards = self._backwards
        if before is None:
            if backwards.awaits is _NextBackward.NO_EXCHANGE:
                backwards.awaits, backwards.is_local = _NextBackward.NOTHING, True
        elif before == self._versions():
            # It was the backward of another model.
            return
        elif backwards.awaits is not _NextBackward.EXCHANGE:
            backwards.is_local = True
            if self.require_backward_grad_sync:
                self._average()
        elif self._is_reduced():
            backwards.awaits, backwards.is_local = _NextBackward.NOTHING, False

    def _versions(self) -> Versions:
        """Each gradient's identity, and its version counter."""
        grads = [p.grad for p in self._parameters_known]
        return [None if grad is None else (id(grad), grad._version) for grad in grads]

    def _is_reduced(self) -> bool:
        """Whether the reducer is not waiting for a parameter."""
        try:
            self.reducer._check_reducer_finalized()
        except RuntimeError:
            return False
        return True

    @property
    def is_complete(self) -> bool:
        """Whether every gradient is the mean over the ranks, or local on purpose, as under `no_sync`."""
        if not self.require_backward_grad_sync:
            return True
        return not self._backwards.is_local and self._is_reduced()

    def complete(self) -> None:
        """Make every gradient the mean over the ranks. Collective: every rank must call it.

        Raises:
            UnusedParametersError: DDP is waiting for the gradients of some parameters.
        """
        try:
            self.reducer._check_reducer_finalized()
        except RuntimeError as error:
            unused = self._named_in(str(error))
            if unused is None:
                raise
            raise UnusedParametersError(unused) from error
        if self._backwards.is_local:
            self._average()

    def has_any(self, parameters: set[int]) -> bool:
        """Whether any parameter of this model is among those with these `id`s."""
        return any(id(p) in parameters for p in self._parameters_known)

    @property
    def joins_uneven_inputs(self) -> bool:
        """Whether ranks that have run out of batches follow the collectives of the others."""
        return bool(self._join_config.enable)

    @property
    def keeps_replicas_alike(self) -> bool:
        """Whether every step is the same on all ranks: gradients are averaged, and not by a hook of the script."""
        hooks = len(self._comm_hooks)
        return self.require_backward_grad_sync and not self.joins_uneven_inputs and hooks <= self.num_hooks

    @torch.no_grad()
    def _average(self) -> None:
        """Average all gradients over the ranks; one that only other ranks have counts as zero here."""
        if self.joins_uneven_inputs:
            raise SteppingError(
                f"Gradients of {type(self.module).__name__} were computed outside of DDP under join_uneven_inputs",
                "Ranks that have run out of batches follow only DDP's own collectives",
                "Call the prepared model itself, and backward() once for each forward",
            )
        self._warn_once()
        group = self._open_group()
        parameters = self._parameters_known
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=group.device)
        anywhere = group.all_reduce(present, "max").tolist()
        gradients = []
        for name, parameter, is_there in zip(self._names_known, parameters, anywhere, strict=True):
            if not is_there:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:
                raise SteppingError(
                    f"The sparse gradient of {name} was computed outside of DDP",
                    "Only dense gradients can be averaged after the backward",
                    "Call the prepared model itself, and backward() once for each forward",
                )
            gradients.append(parameter.grad)
        for chunk in _chunks(gradients):
            flat = group.all_reduce(torch.cat([grad.reshape(-1) for grad in chunk]), "mean")
            for grad, mean in zip(chunk, torch.split(flat, [grad.numel() for grad in chunk]), strict=True):
                grad.copy_(mean.view(grad.shape))
        self._backwards.is_local = False

    def _warn_once(self) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        _LOG.warning(
            "Gradients of %s were computed outside of DDP: by a second backward through one forward, or a forward "
            "that bypasses the prepared model, such as unwrap_model(model).encode(x). They are averaged over the ranks "
            "after each such backward, which is correct but slower. To avoid it, call the prepared model, and add "
            "losses up for one backward().",
            type(self.module).__name__,
        )

    # Parameter names in DDP's errors

    def _named_in(self, message: str) -> list[str] | None:
        """The parameters without a gradient that an error of DDP is about; None for any other error."""
        if "Expected to have finished reduction" not in message:
            return None
        match = re.search(r"did not receive grad for rank \d+: ([\d ,]+)", message)
        if match is None:
            return [name for name, p in self.trained if p.grad is None]
        return [self.trained[int(index)][0] for index in re.findall(r"\d+", match[1])]

    def name_of(self, index: int) -> str:
        """The name of the parameter with this index in the reducer."""
        return self.trained[index][0] if index < len(self.trained) else f"parameter {index}"


def _reset(state: PowerSGDState) -> None:
    """Restart a compression, whose buffers are laid out like the old buckets."""
    state.iter = 0
    for buffers in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
        buffers.clear()


def _chunks(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Split a list into chunks of one dtype and device, of a bounded size."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in by_kind.values():
        chunk: list[Tensor] = []
        size = 0
        for tensor in same:
            chunk.append(tensor)
            size += tensor.nbytes
            if size >= _CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk
