"""Every rank holds a part of every parameter, gradient and optimizer state (`torch.distributed.fsdp.fully_shard`)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from typing_extensions import override

from paceline.config import FullyShardedDataParallelPlugin
from paceline.errors import PrepareError, SteppingError, named
from paceline.precision import autocast_forward
from paceline.strategies.activation_checkpointing import checkpoint_blocks, plain_name
from paceline.strategies.base import Strategy, multiply, refuse_join, short_dtype
from paceline.strategies.blocks import find_units
from paceline.strategies.compilation import compile_model
from paceline.strategies.context import DistributedType
from paceline.strategies.fsdp.sharding import (
    Ownership,
    Replacements,
    initialize_meta,
    local_gradients,
    materialize,
    sharded_axes,
)

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from paceline.checkpoint.format.shards import OptimizerState, TensorShard
    from paceline.strategies.blocks import Units
    from paceline.strategies.context import RunContext

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FSDPStrategy(Strategy):
    """FSDP2: parameters are gathered unit by unit when needed and dropped again."""

    name = "fsdp"
    prepares_again = False

    @property
    @override
    def distributed_type(self) -> DistributedType:
        return DistributedType.FSDP

    def __init__(self, surroundings: RunContext) -> None:
        super().__init__(surroundings)
        self._plugin = surroundings.config.fsdp_config or FullyShardedDataParallelPlugin()
        self._mesh = _build_mesh(surroundings)
        self._mixed = _mixed_precision(surroundings, self._plugin)
        self._replacements = Replacements()
        self._units: dict[int, tuple[FSDPModule, ...]] = {}
        self._told: list[str] = []
        # Models whose gradients are held back just now, and whether any were since the last step.
        self._held_back: set[int] = set()
        self._whole_gradients = False

    # What becomes of models and optimizers

    @override
    def prepare_model(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        plugin = self._plugin
        self._check_sharded(model)
        if isinstance(model, FSDPModule):
            return self._take_over(model)
        self._check_values(model)
        check_shardable(model)
        units = find_units(model, plugin)
        ignored = self._ignored_modules(model)
        names = {id(p): name for name, p in model.named_parameters()}
        ownership = Ownership(model)
        if self.context.group.rank == 0:
            initialize_meta(model, ownership)
        if plugin.activation_checkpointing:
            checkpoint_blocks(model, units.names, offload=plugin.activation_checkpointing_offload)
        placed: set[nn.Module] = set()
        parts = [*(model.get_submodule(name) for name in units.names), model]
        for part in parts:
            if not isinstance(part, FSDPModule):
                self._shard(part, ownership, ignored, placed)
        ownership.check_ties(names)
        self._replacements.record(ownership)
        self._units[id(model)] = _units_in(model)
        autocast_forward(model, self.context.precision)
        compile_model(model, self.context.config.dynamo_config)
        self._tell(units)
        return model

    def _shard(self, module: nn.Module, ownership: Ownership, ignored: list[nn.Module], placed: set[nn.Module]) -> None:
        """Shard what is in `module` and in no unit inside it; `placed` holds the modules done before."""
        own = [p for p in module.parameters() if not isinstance(p, DTensor)]
        inner = [m for m in module.modules() if m not in placed]
        buffers = [(m, name) for m in inner for name, _ in m.named_buffers(recurse=False)]
        materialize(own, buffers, ownership, self.context.device, self.context.group)
        placed.update(inner)
        fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=self._plugin.reshard_after_forward,
            mp_policy=self._mixed,
            offload_policy=self._offload_policy(),
            # Asked for only now: materializing may have replaced parameters.
            ignored_params={p for left_out in ignored for p in left_out.parameters()} or None,
        )

    def _take_over(self, model: nn.Module) -> nn.Module:
        """Go on with a model that is sharded: prepared before, or sharded by the script itself."""
        left = [name for name, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if left:
            raise PrepareError(
                f"{named(left)} of {type(model).__name__}, which is sharded, are trainable and not sharded themselves",
                "FSDP does not average the gradients of ignored parameters, so the ranks would part",
                "Freeze them with requires_grad_(False), or hand over the model before it is sharded",
            )
        units = self._units[id(model)] = _units_in(model)
        for unit in units:
            # A run may have been left inside an accumulation window.
            unit.set_requires_gradient_sync(True, recurse=False)
            _drop_whole_gradients(unit)
        autocast_forward(model, self.context.precision)
        compile_model(model, self.context.config.dynamo_config)
        self._told.append(f"FSDP2: {len(units)} units that were sharded before")
        return model

    def _check_sharded(self, model: nn.Module) -> None:
        """Refuse a model whose modules were sharded otherwise than this run would do it.

        Raises:
            PrepareError: Over other ranks, without values, in another precision, or in other memory; says which.
        """
        sharded = [(name, p) for name, p in model.named_parameters() if isinstance(p, DTensor)]
        where = "cpu" if self._plugin.cpu_offload else self.context.device.type
        for name, parameter in sharded:
            mesh = parameter.device_mesh
            if mesh.size() != self.context.group.size or mesh.device_type != self.context.device.type:
                raise _sharded_otherwise(
                    name,
                    f"over {mesh.size()} ranks ({mesh.device_type})",
                    f"this run trains on {self.context.group.size} ({self.context.device.type})",
                )
            if parameter.is_meta:
                raise _sharded_otherwise(name, "on the meta device", "nobody has values for it")
            if parameter.to_local().device.type != where:
                raise _sharded_otherwise(
                    name,
                    f"in memory of {parameter.to_local().device.type}",
                    f"fsdp_offload_params={self._plugin.cpu_offload} asks for {where}",
                )
        for unit in _units_in(model):
            dtype = unit._get_fsdp_state()._mp_policy.param_dtype
            if dtype not in (None, self._mixed.param_dtype):
                computes = short_dtype(self._mixed.param_dtype or torch.float32)
                raise _sharded_otherwise(
                    type(unit).__name__, f"to compute in {short_dtype(dtype)}", f"this run computes in {computes}"
                )

    def _check_values(self, model: nn.Module) -> None:
        """Say that values are missing, where the ranks were not to get them from rank 0."""
        if self._plugin.cpu_ram_efficient_loading or self.context.group.rank == 0:
            return
        empty = [name for name, p in model.named_parameters() if p.is_meta]
        if empty:
            raise PrepareError(
                f"{named(empty)} of {type(model).__name__} on rank {self.context.group.rank} have no values",
                "fsdp_cpu_ram_efficient_loading is false, so each rank brings its own",
                "Set it to true: rank 0 then gives the others theirs",
            )

    def _offload_policy(self) -> OffloadPolicy:
        if not self._plugin.cpu_offload:
            return OffloadPolicy()
        # Pinned memory belongs to an accelerator; without one torch refuses to allocate it.
        return CPUOffloadPolicy(pin_memory=self.context.device.type != "cpu")

    def _ignored_modules(self, model: nn.Module) -> list[nn.Module]:
        pattern = self._plugin.ignored_modules
        if pattern is None:
            return []
        matched = [module for name, module in model.named_modules() if re.fullmatch(pattern, name)]
        if not matched:
            raise PrepareError(
                f"fsdp_ignored_modules={pattern!r} matches no module of {type(model).__name__}",
                "The pattern must match a module's whole name",
                f"Names look like {', '.join([n for n, _ in model.named_modules() if n][:6])}",
            )
        if any(p.requires_grad for module in matched for p in module.parameters()):
            raise PrepareError(
                f"fsdp_ignored_modules={pattern!r} matches trainable parameters",
                "FSDP does not average the gradients of ignored parameters, so the ranks would part",
                "Freeze them with requires_grad_(False), or let them be sharded",
            )
        return matched

    @override
    def prepare_evaluation(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        if isinstance(model, FSDPModule) or any(p.is_meta for p in model.parameters()):
            return self.prepare_model(model, place=place)
        return super().prepare_evaluation(model, place=place)

    @override
    def rebind_optimizer(self, optimizer: Optimizer) -> None:
        self._replacements.renew(optimizer)

    @override
    def replaced(self, parameter: nn.Parameter) -> bool:
        return self._replacements.has_replaced(parameter)

    @override
    def add_group(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        given = group["params"]
        listed = [
            self._replacements.resolve_placeholder_optimizer(p)
            for p in ([given] if isinstance(given, torch.Tensor) else given)
        ]
        whole = {id(p): p for p in listed if p.requires_grad and not isinstance(p, DTensor)}
        if whole:
            names = [name for model in self._models for name, p in self.named_parameters(model) if id(p) in whole]
            raise PrepareError(
                f"add_param_group() brought {named(names or [str(tuple(p.shape)) for p in whole.values()])}, "
                "which came into the model after prepare()",
                "FSDP2 shards what it finds when it prepares a model: gradients of later parameters stay on each rank",
                "Build the model whole before prepare(), and freeze what is to learn later with requires_grad_(False)",
            )
        super().add_group(optimizer, {**group, "params": listed})

    # One step

    @override
    def set_gradient_sync(self, model: nn.Module, enabled: bool) -> None:
        if enabled:
            self._held_back.discard(id(model))
        else:
            self._held_back.add(id(model))
        for unit in self._units.get(id(model), ()):
            unit.set_requires_gradient_sync(enabled, recurse=False)

    @override
    def backward(self, loss: Tensor, scale: Tensor | None = None, **kwargs: Any) -> None:
        self._whole_gradients = self._whole_gradients or bool(self._held_back)
        super().backward(loss, scale, **kwargs)

    @override
    def complete_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        if not self._whole_gradients:
            return
        self._whole_gradients = False
        if all(p.grad is None for p in parameters):
            raise SteppingError(
                "A step was asked for whose only backward ran under no_sync()",
                "FSDP2 keeps such gradients whole and outside of parameter.grad until a backward exchanges them, so "
                "the step would train nothing",
                "Run the last backward before a step outside of no_sync()",
            )

    @override
    @torch.no_grad()
    def scale_gradients(self, parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
        multiply((local for local, _, _ in local_gradients(parameters)), factor)

    @override
    @torch.no_grad()
    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float) -> Tensor:
        """Clip by the norm over all ranks: each rank's share is summed with one tiny collective a mesh axis.

        Exact for any subset of the parameters, and without DTensor's dispatch for each of them.
        """
        gradients = local_gradients(parameters)
        total = self._total_norm(gradients, float(norm_type))
        # The same guard as torch.nn.utils.clip_grad_norm_.
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        multiply((local for local, _, _ in gradients), factor)
        return total

    def _total_norm(self, gradients: list[tuple[Tensor, Sequence[Any], Any]], norm_type: float) -> Tensor:
        device = self.context.device
        together = _Norm(norm_type)
        shares: dict[tuple[int, ...], tuple[DeviceMesh | None, list[Tensor]]] = {}
        for local, placements, mesh in gradients:
            shares.setdefault(sharded_axes(placements), (mesh, []))[1].append(local)
        total = torch.zeros((), device=device)
        for axes, (mesh, locals_) in sorted(shares.items(), key=lambda item: item[0]):
            share = together.of(locals_, device)
            for axis in axes:
                assert mesh is not None
                dist.all_reduce(share, op=together.op, group=mesh.get_group(axis))
            total = together.add(total, share)
        return together.root(total)

    @override
    @torch.no_grad()
    def clip_value(self, parameters: Iterable[nn.Parameter], value: float) -> None:
        for local, _, _ in local_gradients(parameters):
            local.clamp_(-value, value)

    @override
    def join(self, models: Sequence[nn.Module]) -> AbstractContextManager[Any]:
        raise refuse_join("FSDP2")

    # State, in and out

    @override
    def model_state(self, model: nn.Module) -> dict[str, TensorShard]:
        self._gather_nothing()
        return super().model_state(model)

    @override
    def optimizer_state(self, optimizer: Optimizer, names: Mapping[int, str]) -> OptimizerState:
        self._gather_nothing()
        return super().optimizer_state(optimizer, names)

    @override
    def state_written(self) -> None:
        self._gather_nothing()

    def _gather_nothing(self) -> None:
        """Drop whole copies of parameters that outlived a forward: the shards are the state."""
        for units in self._units.values():
            for unit in units:
                unit.reshard()

    @override
    def gather_parameters(
        self, parameters: Sequence[nn.Parameter], modifier_rank: int | None
    ) -> AbstractContextManager[Any]:
        raise PrepareError(
            "gather_parameters was called under FSDP2",
            "It gathers whole units, not single parameters",
            "Call unshard() and reshard() of the module, parameter.full_tensor(), or accelerator.get_state_dict(model)",
        )

    # What others want to know

    @override
    def named_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return ((plain_name(name), parameter) for name, parameter in model.named_parameters())

    @override
    def gather_state(self, model: nn.Module, *, without: Container[str] = ()) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        first_names: dict[int, str] = {}
        aliases = {
            plain_name(name): first_names.setdefault(id(p), plain_name(name))
            for name, p in model.named_parameters(remove_duplicate=False)
        }
        for name, value in model.state_dict().items():
            first = aliases.get(name, name)
            if not torch.is_tensor(value) or name in without:
                continue
            # A tied weight is gathered once, and stays one tensor.
            whole = state[first] if first in state else self._whole(value).detach()
            if self.context.world.is_main:
                state[name] = whole.cpu()
            else:
                state[name] = whole.new_empty(0)
        return state if self.context.world.is_main else {}

    def _whole(self, value: Tensor) -> Tensor:
        if not isinstance(value, DTensor):
            return value
        local = value.to_local().to(self.context.device)
        here = DTensor.from_local(local, value.device_mesh, value.placements, shape=value.shape, stride=value.stride())
        return here.full_tensor()

    def _tell(self, units: Units) -> None:
        shape = " x ".join(
            f"{name} {size}" for name, size in zip(self._mesh.mesh_dim_names or (), self._mesh.shape, strict=True)
        )
        after = self._plugin.reshard_after_forward
        kept = "dropped after" if after is True else "kept after" if after is False else f"cut in {after} after"
        extras = [
            text
            for text, on in (
                ("activation checkpointing", self._plugin.activation_checkpointing),
                ("parameters in host memory", self._plugin.cpu_offload),
            )
            if on
        ]
        self._told.append("; ".join([f"FSDP2 over {shape}: {units}", f"parameters {kept} the forward", *extras]))

    @override
    def describe(self) -> list[str]:
        return list(self._told)

    @override
    def dtypes(self) -> dict[str, str]:
        table = super().dtypes()
        if self._mixed.param_dtype is not None:
            table["compute"] = short_dtype(self._mixed.param_dtype)
        if self._mixed.reduce_dtype is not None:
            table["reduce"] = short_dtype(self._mixed.reduce_dtype)
        return table


def check_shardable(model: nn.Module) -> None:
    """Refuse parameters that cannot be cut into rows.

    Raises:
        PrepareError: They have no dimension, or are complex beside real ones; it names them.
    """
    named_parameters = list(model.named_parameters())
    scalars = [name for name, p in named_parameters if p.ndim == 0]
    if scalars:
        raise PrepareError(
            f"{named(scalars)} of {type(model).__name__} {'has' if len(scalars) == 1 else 'have'} no dimension",
            "FSDP2 cuts every parameter along its first dimension",
            "Give it one, nn.Parameter(torch.tensor([2.65])), which changes nothing in most formulas; or train with "
            "strategy='ddp'",
        )
    complex_ones = [name for name, p in named_parameters if p.is_complex()]
    if complex_ones:
        raise PrepareError(
            f"{named(complex_ones)} of {type(model).__name__} {'holds' if len(complex_ones) == 1 else 'hold'} complex "
            "numbers",
            "FSDP2 gathers the parameters of a unit in one real dtype",
            "Keep real numbers in the parameter, [..., 2], and use torch.view_as_complex() in the forward, or train "
            "with strategy='ddp'",
        )


def _units_in(model: nn.Module) -> tuple[FSDPModule, ...]:
    return tuple(module for module in model.modules() if isinstance(module, FSDPModule))


def _drop_whole_gradients(unit: FSDPModule) -> None:
    """Forget gradients that were held back and never exchanged, which no zero_grad() of the script reaches."""
    for group in unit._get_fsdp_state()._fsdp_param_groups:
        for held in group.fsdp_params:
            held.unsharded_accumulated_grad = None
            whole = getattr(held, "_unsharded_param", None)
            if whole is not None:
                whole.grad = None


def _sharded_otherwise(what: str, how: str, wanted: str) -> PrepareError:
    return PrepareError(
        f"{what} is sharded already, {how}",
        f"A module is sharded once, and {wanted}",
        "Build the model anew and prepare that, or give this run the same settings",
    )


class _Norm:
    """How norms of parts make the norm of the whole: sums of powers, or the largest."""

    def __init__(self, norm_type: float) -> None:
        self._type = norm_type
        self._largest = norm_type == float("inf")
        self.op = dist.ReduceOp.MAX if self._largest else dist.ReduceOp.SUM

    def of(self, tensors: list[Tensor], device: torch.device) -> Tensor:
        # A rank may hold no row of a short parameter, and the largest of nothing is not defined.
        filled = [tensor for tensor in tensors if tensor.numel()]
        if not filled:
            return torch.zeros((), device=device)
        norm = torch.nn.utils.get_total_norm(filled, self._type).to(device, torch.float32)
        return norm if self._largest else norm.pow(self._type)

    def add(self, total: Tensor, share: Tensor) -> Tensor:
        return torch.maximum(total, share) if self._largest else total + share

    def root(self, total: Tensor) -> Tensor:
        return total if self._largest else total.pow(1.0 / self._type)


def _build_mesh(context: RunContext) -> DeviceMesh:
    """One axis of shards, or two: replicas of shards (hybrid sharding)."""
    size = context.group.size
    asked = context.config.parallelism_config
    replicas = asked.dp_replicate_size if asked else 1
    shards = asked.dp_shard_size if asked and asked.dp_shard_size > 1 else size // replicas
    if replicas * shards != size:
        raise PrepareError(
            f"parallelism_config asks for {replicas} replicas x {shards} shards on {size} ranks",
            "Their product must be the number of ranks",
            f"Use {size // shards if size % shards == 0 else 1} replicas or {size // replicas} shards",
        )
    if replicas == 1:
        return init_device_mesh(context.device.type, (size,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(context.device.type, (replicas, shards), mesh_dim_names=("dp_replicate", "dp_shard"))


def _mixed_precision(context: RunContext, plugin: FullyShardedDataParallelPlugin) -> MixedPrecisionPolicy:
    """Compute in the run's precision, and add up gradients in fp32 unless something else is asked for.

    The output is left as it comes: rounding it would round the loss that users log by up to 0.4 %.
    """
    policy = context.precision
    compute = _DTYPES[plugin.param_dtype] if plugin.param_dtype else None
    if compute is None and policy.mode != "no":
        compute = policy.compute_dtype
    reduce = _DTYPES[plugin.reduce_dtype] if plugin.reduce_dtype else None
    if reduce is None and compute is not None:
        reduce = torch.float32
    output = _DTYPES[plugin.output_dtype] if plugin.output_dtype else None
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, output_dtype=output)
