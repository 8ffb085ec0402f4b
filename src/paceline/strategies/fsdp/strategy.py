"""Every rank has a shard of every parameter, gradient and optimizer state (`torch.distributed.fsdp.fully_shard`)."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

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
from paceline.errors import PrepareError, SteppingError, counted, named
from paceline.strategies.activation_checkpointing import checkpoint_blocks, plain_name
from paceline.strategies.base import (
    Strategy,
    check_dense_gradients,
    check_needs_no_closure,
    refuse_join,
)
from paceline.strategies.blocks import find_units
from paceline.strategies.context import DistributedType
from paceline.strategies.fsdp.fused_steps import fuse_steps_of_shards
from paceline.strategies.fsdp.overlap import check_switches, describe_switches, set_switches
from paceline.strategies.fsdp.sharding import (
    Ownership,
    Replacements,
    initialize_meta,
    local_gradients,
    materialize,
    refuse_hooks_of_whole,
    refuse_mixed_dtypes,
    sharded_axes,
)
from paceline.strategies.precision import DTYPES, autocast_forward, short_dtype
from paceline.strategies.precision.fp8_layers import has_layers, plain_local
from paceline.strategies.protocols import multiply
from paceline.strategies.use_check import UseCheck

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from paceline.checkpoint.format.shards import OptimizerState, TensorShard
    from paceline.strategies.blocks import Units
    from paceline.strategies.context import RunContext
    from paceline.strategies.precision.fp8 import Fp8Layers

_BLOCK_CLASSES = "fsdp_config.fsdp_transformer_layer_cls_to_wrap"


class FSDPStrategy(Strategy):
    """FSDP2: parameters are gathered unit by unit when needed and dropped afterwards."""

    name = "fsdp"
    prepares_again = False

    def __init__(self, context: RunContext) -> None:
        super().__init__(context)
        self._plugin = context.config.fsdp_config or FullyShardedDataParallelPlugin()
        fuse_steps_of_shards()
        self._mesh = _build_mesh(context)
        self._mixed = _mixed_precision(context, self._plugin)
        self._replacements = Replacements()
        self._units: dict[int, tuple[FSDPModule, ...]] = {}
        # Those whose parameters stay gathered after a forward.
        self._kept: list[FSDPModule] = []
        self._description: list[str] = []
        self._uses = UseCheck(context.group, "FSDP2", "set fsdp_find_unused_parameters: true (torch 2.13)")
        # Models whose gradient sync is off, and whether a backward ran under that since the last step.
        self._without_sync: set[int] = set()
        self._has_unsharded_gradients = False

    @property
    @override
    def distributed_type(self) -> DistributedType:
        return DistributedType.FSDP

    @property
    @override
    def mesh(self) -> DeviceMesh:
        return self._mesh

    # Models and optimizers

    @override
    def prepare_model(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        plugin = self._plugin
        self._check_sharded(model)
        if isinstance(model, FSDPModule):
            return self._prepare_sharded(model)
        self._check_values(model)
        check_shardable(model)
        check_dense_gradients(model, "FSDP2")
        refuse_hooks_of_whole(model)
        check_switches(plugin)
        units = find_units(model, plugin, source=f"{self.context.source_of(_BLOCK_CLASSES)}: {_BLOCK_CLASSES}")
        ignored = self._ignored_modules(model)
        refuse_mixed_dtypes([*((name, model.get_submodule(name)) for name in units.names), ("", model)], ignored)
        names = {id(p): name for name, p in model.named_parameters()}
        ownership = Ownership(model)
        if self.context.group.rank == 0:
            initialize_meta(model, ownership)
        if plugin.activation_checkpointing:
            checkpoint_blocks(
                model,
                units.names,
                offload=plugin.activation_checkpointing_offload,
                keeps_products=plugin.activation_checkpointing_policy == "products",
            )
        layers = self.fp8.convert(model, gathers=True)
        placed: set[nn.Module] = set()
        for module in [*(model.get_submodule(name) for name in units.names), model]:
            if not isinstance(module, FSDPModule):
                self._shard(module, ownership, ignored, placed, layers)
        ownership.check_ties(names)
        self._replacements.record(ownership)
        self._units[id(model)] = _units_in(model)
        self._kept += set_switches(model, units.names[::-1], plugin)
        autocast_forward(model, self.context.precision)
        if layers is not None and layers.gathered:
            uncompiled: Any = torch.compiler.disable
            model.register_forward_pre_hook(uncompiled(layers.gathered.check))
            layers.gathered.changed()
        self.compiler.compile(model)
        self._note_description(units)
        return model

    def _shard(
        self,
        module: nn.Module,
        ownership: Ownership,
        ignored: list[nn.Module],
        placed: set[nn.Module],
        layers: Fp8Layers | None,
    ) -> None:
        """Shard what is in `module` and in no unit inside it; `placed` has the modules that are done."""
        own = [p for p in module.parameters() if not isinstance(p, DTensor)]
        inner = [m for m in module.modules() if m not in placed]
        buffers = [(m, name) for m in inner for name, _ in m.named_buffers(recurse=False)]
        materialize(own, buffers, ownership, self.context.device, self.context.group)
        if layers is not None:
            layers.gather_in_fp8(_outside(inner, ignored), ownership.replace, self._mesh.shape[-1])
        placed.update(inner)
        fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=self._plugin.reshard_after_forward,
            mp_policy=self._mixed,
            offload_policy=self._offload_policy(),
            # Listed only now: materializing may have replaced parameters.
            ignored_params={p for inner in ignored for p in inner.parameters()} or None,
        )
        # A class that torch has made for FSDP; its own method says only that it cannot be copied.
        type(module).__deepcopy__ = _refuse_copy  # type: ignore[attr-defined]

    def _prepare_sharded(self, model: nn.Module) -> nn.Module:
        """Prepare a model that is sharded already: prepared before, or sharded by the script itself."""
        left = [name for name, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if left:
            raise PrepareError(
                f"{named(left)} of {type(model).__name__}, which is sharded, are trainable and not sharded themselves",
                "FSDP does not average the gradients of ignored parameters, so ranks would train different weights",
                "Freeze them with requires_grad_(False), or pass the model before it is sharded",
            )
        units = self._units[id(model)] = _units_in(model)
        for unit in units:
            # The previous run may have ended inside an accumulation window.
            unit.set_requires_gradient_sync(True, recurse=False)
            _drop_whole_gradients(unit)
        if not has_layers(model):
            self.fp8.convert(model)
        autocast_forward(model, self.context.precision)
        self.compiler.compile(model)
        self._description.append(f"FSDP2: {len(units)} units that were sharded already")
        return model

    def _check_sharded(self, model: nn.Module) -> None:
        """Refuse a model that is sharded in another way than this run would shard it.

        Raises:
            PrepareError: Over other ranks, without values, in another precision, or in other memory.
        """
        sharded = [(name, p) for name, p in model.named_parameters() if isinstance(p, DTensor)]
        _refuse_shared(model, sharded, self._models)
        _refuse_foreign(model, sharded)
        where = "cpu" if self._plugin.cpu_offload else self.context.device.type
        for name, parameter in sharded:
            mesh = parameter.device_mesh
            if mesh.size() != self.context.group.size or mesh.device_type != self.context.device.type:
                raise _other_sharding(
                    name,
                    f"over {mesh.size()} ranks ({mesh.device_type})",
                    f"this run trains on {self.context.group.size} ({self.context.device.type})",
                )
            if parameter.is_meta:
                raise _other_sharding(name, "on the meta device", "no rank has values for it")
            if parameter.to_local().device.type != where:
                raise _other_sharding(
                    name,
                    f"in {parameter.to_local().device.type} memory",
                    f"fsdp_offload_params={self._plugin.cpu_offload} needs it in {where} memory",
                )
        for unit in _units_in(model):
            self._check_computation(unit)

    def _check_computation(self, unit: Any) -> None:
        """Refuse a unit that computes in another precision than this run.

        Raises:
            PrepareError: It does.
        """
        if has_layers(unit) and self.context.precision.mode != "fp8":
            raise _other_sharding(type(unit).__name__, "to compute in fp8", "this run computes in bf16 or fp32")
        dtype = unit._get_fsdp_state()._mp_policy.param_dtype
        if dtype not in (None, self._mixed.param_dtype):
            computes = short_dtype(self._mixed.param_dtype or torch.float32)
            raise _other_sharding(
                type(unit).__name__, f"to compute in {short_dtype(dtype)}", f"this run computes in {computes}"
            )

    def _check_values(self, model: nn.Module) -> None:
        """Refuse parameters without values on this rank, unless rank 0 broadcasts its own."""
        if self._plugin.cpu_ram_efficient_loading or self.context.group.rank == 0:
            return
        empty = [name for name, p in model.named_parameters() if p.is_meta]
        if empty:
            raise PrepareError(
                f"{named(empty)} of {type(model).__name__} on rank {self.context.group.rank} have no values",
                "fsdp_cpu_ram_efficient_loading is false, so each rank must load the values itself",
                "Set it to true: rank 0 then broadcasts its values",
            )

    def _offload_policy(self) -> OffloadPolicy:
        if not self._plugin.cpu_offload:
            return OffloadPolicy()
        # Without an accelerator torch cannot allocate pinned memory.
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
                "FSDP does not average the gradients of ignored parameters, so ranks would train different weights",
                "Freeze them with requires_grad_(False), or have them sharded",
            )
        return matched

    @override
    def prepare_evaluation(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        if isinstance(model, FSDPModule) or any(p.is_meta for p in model.parameters()):
            return self.prepare_model(model, place=place)
        return super().prepare_evaluation(model, place=place)

    @override
    def rebind_optimizer(self, optimizer: Optimizer) -> None:
        if self.context.group.size > 1:
            check_needs_no_closure(optimizer, "FSDP2", "It computes with all parameters as one vector, not with shards")
        self._replacements.rebind(optimizer)

    @override
    def replaced(self, parameter: nn.Parameter) -> bool:
        return self._replacements.has_replaced(parameter)

    @override
    def add_group(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        given = group["params"]
        listed = [self._replacements.replacement_of(p) for p in ([given] if isinstance(given, torch.Tensor) else given)]
        unsharded = {id(p): p for p in listed if p.requires_grad and not isinstance(p, DTensor)}
        if unsharded:
            names = [name for model in self._models for name, p in self.named_parameters(model) if id(p) in unsharded]
            names = names or [str(tuple(p.shape)) for p in unsharded.values()]
            raise PrepareError(
                f"add_param_group() was called with {named(names)}, which was added to the model after prepare()",
                "FSDP2 shards a model once, in prepare(): gradients of parameters added later are not averaged",
                "Build the whole model before prepare(), and freeze what is trained later with requires_grad_(False)",
            )
        super().add_group(optimizer, {**group, "params": listed})

    # One step

    @override
    def set_gradient_sync(self, model: nn.Module, enabled: bool) -> None:
        if enabled:
            self._without_sync.discard(id(model))
        else:
            self._without_sync.add(id(model))
        for unit in self._units.get(id(model), ()):
            unit.set_requires_gradient_sync(enabled, recurse=False)

    @override
    @contextmanager
    def sync_next_backward(self, model: nn.Module) -> Iterator[None]:
        was_off = id(model) in self._without_sync
        self.set_gradient_sync(model, True)
        try:
            yield
        finally:
            self.set_gradient_sync(model, not was_off)

    @override
    def backward(self, loss: Tensor, scale: Tensor | None = None, **kwargs: Any) -> None:
        self._has_unsharded_gradients = self._has_unsharded_gradients or bool(self._without_sync)
        if isinstance(loss, DTensor) and self.context.group.size > 1:
            raise _penalty_error()
        try:
            super().backward(loss, scale, **kwargs)
        except RuntimeError as error:
            _explain_backward_error(error)
            raise

    @override
    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        try:
            return super().step(optimizer, closure)
        except RuntimeError as error:
            if closure is None:
                _explain_step_error(optimizer, error)
            raise

    def _drop_gathered(self) -> bool:
        """Drop gathered weights that a forward without a backward has left; they hide the shards and become stale."""
        gathered = [unit for unit in self._kept if any(group.is_unsharded for group in _groups_of(unit))]
        for unit in gathered:
            unit.reshard()
        return len(gathered) > 0

    @override
    def check_first_backward(self) -> None:
        self._drop_gathered()

    @override
    def parameters(self) -> list[nn.Parameter]:
        if self._parameters is None:
            self._drop_gathered()
        return super().parameters()

    @override
    def complete_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        self._check_hooks(parameters)
        if self._drop_gathered():
            whole = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
            if whole:
                raise SteppingError(
                    f"{len(whole)} parameters were passed that a forward after the last backward has gathered",
                    "Their gradients are in the shards, so nothing would happen to them",
                    "List the parameters once, after prepare(), or run that forward under torch.no_grad()",
                )
        if not self._has_unsharded_gradients:
            self._compare_uses(parameters)
            return
        self._has_unsharded_gradients = False
        if all(p.grad is None for p in parameters):
            raise SteppingError(
                "optimizer.step() was called, and every backward since the last step ran under no_sync()",
                "FSDP2 keeps such gradients unsharded and outside of parameter.grad until a backward reduces them, so "
                "the step would change nothing",
                "Run the last backward before a step outside of no_sync()",
            )

    def _compare_uses(self, parameters: Sequence[nn.Parameter]) -> None:
        if self._uses.is_due:
            self._uses.compare(parameters, [p.grad is not None for p in parameters], self._name_of)

    def _name_of(self, parameter: nn.Parameter) -> str:
        pairs = (pair for model in self._models for pair in self.named_parameters(model))
        return next((name for name, p in pairs if p is parameter), str(tuple(parameter.shape)))

    def _check_hooks(self, parameters: Sequence[nn.Parameter]) -> None:
        hooked = [p for p in parameters if p._backward_hooks]
        if not hooked:
            return
        raise SteppingError(
            f"register_hook() was called on {named([self._name_of(p) for p in hooked])}",
            "FSDP2 writes gradients into the shards without autograd, so the hooks are never called",
            "Use register_post_accumulate_grad_hook(), where the averaged gradient is a DTensor, or change "
            "parameter.grad between backward() and step()",
        )

    @override
    @torch.no_grad()
    def scale_gradients(self, parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
        multiply((local for local, _, _ in local_gradients(parameters)), factor)

    @override
    @torch.no_grad()
    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float) -> Tensor:
        """Clip by the norm over all ranks, which takes one small collective for each mesh axis.

        It is exact for any subset of the parameters, and avoids DTensor's dispatch for each of them.
        """
        gradients = local_gradients(parameters)
        total = self._total_norm(gradients, float(norm_type))
        # The same guard as torch.nn.utils.clip_grad_norm_.
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        multiply((local for local, _, _ in gradients), factor)
        return total

    def _total_norm(self, gradients: list[tuple[Tensor, Sequence[Any], Any]], norm_type: float) -> Tensor:
        device = self.context.device
        norm = _Norm(norm_type)
        shares: dict[tuple[int, ...], tuple[DeviceMesh | None, list[Tensor]]] = {}
        for local, placements, mesh in gradients:
            shares.setdefault(sharded_axes(placements), (mesh, []))[1].append(local)
        total = torch.zeros((), device=device)
        for axes, (mesh, locals_) in sorted(shares.items(), key=lambda item: item[0]):
            share = norm.of(locals_, device)
            for axis in axes:
                assert mesh is not None
                dist.all_reduce(share, op=norm.op, group=mesh.get_group(axis))
            total = norm.add(total, share)
        return norm.root(total)

    @override
    @torch.no_grad()
    def clip_value(self, parameters: Iterable[nn.Parameter], value: float) -> None:
        for local, _, _ in local_gradients(parameters):
            local.clamp_(-value, value)

    @override
    def join(self, models: Sequence[nn.Module]) -> AbstractContextManager[Any]:
        raise refuse_join("FSDP2")

    # Training state

    @override
    def model_state(self, model: nn.Module) -> dict[str, TensorShard]:
        self._reshard()
        return super().model_state(model)

    @override
    def optimizer_state(self, optimizer: Optimizer, names: Mapping[int, str]) -> OptimizerState:
        self._reshard()
        return super().optimizer_state(optimizer, names)

    @override
    def state_written(self) -> None:
        self._reshard()
        self.fp8.state_written()

    @override
    def stepped(self) -> None:
        super().stepped()
        self._uses.stepped()
        self.fp8.stepped()

    def _reshard(self) -> None:
        """Drop gathered copies of parameters that a forward has left behind: the shards are the state."""
        for units in self._units.values():
            for unit in units:
                unit.reshard()

    @override
    def gather_parameters(
        self, parameters: Sequence[nn.Parameter], modifier_rank: int | None
    ) -> AbstractContextManager[Any]:
        raise PrepareError(
            "gather_parameters was called under FSDP2",
            "FSDP2 gathers whole units, not single parameters",
            "Call unshard() and reshard() of the module, parameter.full_tensor(), or accelerator.get_state_dict(model)",
        )

    # Names and descriptions

    @override
    def named_parameters(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        self._drop_gathered()
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
            # A tied weight is gathered once, and remains one tensor.
            whole = state[first] if first in state else self._whole(value).detach()
            if self.context.world.is_main:
                state[name] = whole.cpu()
            else:
                state[name] = whole.new_empty(0)
        return state if self.context.world.is_main else {}

    def _whole(self, value: Tensor) -> Tensor:
        if not isinstance(value, DTensor):
            return value
        local = plain_local(value.to_local()).to(self.context.device)
        here = DTensor.from_local(local, value.device_mesh, value.placements, shape=value.shape, stride=value.stride())
        return here.full_tensor()

    def _note_description(self, units: Units) -> None:
        shape = " x ".join(
            f"{counted(size, 'rank')} ({name})"
            for name, size in zip(self._mesh.mesh_dim_names or (), self._mesh.shape, strict=True)
        )
        after = self._plugin.reshard_after_forward
        kept = "kept" if after is False else "dropped"
        if not isinstance(after, bool):
            kept = f"resharded over {after} ranks"
        extras = [
            text
            for text, on in (
                (_checkpointing_text(self._plugin), self._plugin.activation_checkpointing),
                ("parameters in host memory", self._plugin.cpu_offload),
            )
            if on
        ]
        self._description.append(
            "; ".join(
                [
                    f"FSDP2 over {shape}: {units}",
                    f"parameters {kept} after the forward",
                    *describe_switches(self._plugin),
                    *extras,
                ]
            )
        )

    @override
    def describe(self) -> list[str]:
        return list(self._description)

    @override
    def dtypes(self) -> dict[str, str]:
        table = super().dtypes()
        if self._mixed.param_dtype is not None:
            table["compute"] = short_dtype(self._mixed.param_dtype)
        if self._mixed.reduce_dtype is not None:
            table["reduce"] = short_dtype(self._mixed.reduce_dtype)
        return table


def check_shardable(model: nn.Module) -> None:
    """Refuse parameters that FSDP2 cannot shard.

    Raises:
        PrepareError: They are of shape [] or complex; it names them.
    """
    named_parameters = list(model.named_parameters())
    scalars = [name for name, p in named_parameters if p.ndim == 0]
    if scalars:
        raise PrepareError(
            f"{named(scalars)} of {type(model).__name__} {'has' if len(scalars) == 1 else 'have'} no dimension",
            "FSDP2 shards every parameter along its first dimension",
            "Use shape [1], as in nn.Parameter(torch.tensor([2.65])), which broadcasts like a scalar; or train with "
            "strategy='ddp'",
        )
    complex_ones = [name for name, p in named_parameters if p.is_complex()]
    if complex_ones:
        raise PrepareError(
            f"{named(complex_ones)} of {type(model).__name__} {'is' if len(complex_ones) == 1 else 'are'} complex",
            "FSDP2 gathers the parameters of a unit in one real dtype",
            "Make the parameter real, of shape [..., 2], and use torch.view_as_complex() in the forward, or train "
            "with strategy='ddp'",
        )


def _checkpointing_text(plugin: FullyShardedDataParallelPlugin) -> str:
    if plugin.activation_checkpointing_policy == "products":
        return "activation checkpointing of all but matrix products and attention"
    return "activation checkpointing"


def _outside(modules: Iterable[nn.Module], ignored: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the modules that are in none of the ignored ones."""
    inside = {module for other in ignored for module in other.modules()}
    return [module for module in modules if module not in inside]


def _units_in(model: nn.Module) -> tuple[FSDPModule, ...]:
    return tuple(module for module in model.modules() if isinstance(module, FSDPModule))


def _groups_of(unit: FSDPModule) -> list[Any]:
    """The groups of parameters of a unit: several in torch 2.13, one or none in earlier versions."""
    state = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [group for group in (getattr(state, "_fsdp_param_group", None),) if group is not None]
    return list(groups)


def _drop_whole_gradients(unit: FSDPModule) -> None:
    """Drop gradients that were accumulated without an exchange: zero_grad() of the script does not reach them."""
    for group in _groups_of(unit):
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            whole = getattr(parameter, "_unsharded_param", None)
            if whole is not None:
                whole.grad = None


def _refuse_copy(module: nn.Module, memo: dict[int, Any]) -> NoReturn:
    """Refuse to deep-copy a sharded module.

    Raises:
        PrepareError: Always.
    """
    raise PrepareError(
        f"copy.deepcopy was called on {type(module).__name__}, which FSDP has sharded; AveragedModel calls it, too",
        "The copy would share its FSDP state with the original",
        "Copy the model before prepare(), and prepare both: model, average = prepare(model, AveragedModel(model))",
    )


def _penalty_error() -> SteppingError:
    return SteppingError(
        "The loss has a term of the sharded parameters, such as a penalty of weights: it is a DTensor",
        "Torch cannot differentiate a sum of a DTensor and of a loss that each rank has of its own samples, nor add a "
        "gradient of all ranks to shards",
        "Add what this rank's shards contribute, as in loss + 0.01 * sum(p.to_local().pow(2).sum() for p in "
        "model.parameters()), or let the optimizer's weight_decay do it",
    )


def _explain_backward_error(error: RuntimeError) -> None:
    """Explain what torch says of weights that FSDP2 has dropped or divided.

    Raises:
        SteppingError: It is one of these errors.
    """
    text = str(error)
    if "mixed torch.Tensor and DTensor" in text:
        raise _penalty_error() from error
    if "out of bounds for storage of size 0" in text:
        raise SteppingError(
            "A gradient that was computed with create_graph=True is differentiated again, as in a gradient penalty",
            "FSDP2 drops the gathered weights after a backward, and the backward through it needs them",
            "Use strategy='ddp', where a gradient penalty is right, or zero_stage 1 or 2, where "
            "accelerator.unwrap_model(model) computes what is differentiated twice",
        ) from error


def _explain_step_error(optimizer: Optimizer, error: RuntimeError) -> None:
    """Explain what torch says where an optimizer cannot update shards.

    Raises:
        SteppingError: It is such an error.
    """
    text = str(error)
    if "sharding strategy registered" in text or "require placement changes" in text:
        raise SteppingError(
            f"{type(optimizer).__name__} cannot step on FSDP2's shards: {text.splitlines()[0]}",
            "It computes with whole parameters, or with operations for which DTensor has no rule",
            "Use an optimizer that treats each element alone, such as AdamW or SGD, or train with strategy='ddp'",
        ) from error


def _refuse_shared(model: nn.Module, sharded: Iterable[tuple[str, DTensor]], prepared: Iterable[nn.Module]) -> None:
    """Refuse parameters that a unit of another prepared model gathers, and this model has outside of its own units."""
    units = _parameters_of_units(model)
    owners = {id(p): other for other in prepared for p in other.parameters() if id(p) not in units}
    shared = [(name, owners[id(p)]) for name, p in sharded if id(p) in owners]
    if shared:
        raise PrepareError(
            f"{named([name for name, _ in shared], 4)} of {type(model).__name__} "
            f"{'is' if len(shared) == 1 else 'are'} in {_plain_class(shared[0][1])}, too, which was prepared before",
            "FSDP2 gathers the weights of a model in its own forward, and not in that of another model",
            "Put both into one module that calls them, and prepare that; or use strategy='ddp'",
        )


def _parameters_of_units(model: nn.Module) -> set[int]:
    """The `id`s of the parameters that units of this model gather."""
    return {id(p) for unit in model.modules() if isinstance(unit, FSDPModule) for p in unit.parameters()}


def _plain_class(model: nn.Module) -> str:
    """The name of a model's class before FSDP has made one of its own from it."""
    return type(model).__name__.removeprefix("FSDP")


def _refuse_foreign(model: nn.Module, sharded: Iterable[tuple[str, DTensor]]) -> None:
    """Refuse parameters that something other than FSDP has sharded, such as tensor parallelism."""
    of_units = _parameters_of_units(model)
    for name, parameter in sharded:
        if id(parameter) not in of_units:
            axes = ", ".join(parameter.device_mesh.mesh_dim_names or ("no name",))
            how = f"over the mesh axis {axes} by something other than FSDP"
            raise _other_sharding(name, how, "FSDP would need these ranks, too")


def _other_sharding(what: str, how: str, wanted: str) -> PrepareError:
    return PrepareError(
        f"{what} is sharded already, {how}",
        f"A module can only be sharded once, and {wanted}",
        "Rebuild the model and prepare that, or use the same settings in this run",
    )


class _Norm:
    """Combines the norms of shards: as a sum of powers, or the largest."""

    def __init__(self, norm_type: float) -> None:
        self._type = norm_type
        self._largest = norm_type == float("inf")
        self.op = dist.ReduceOp.MAX if self._largest else dist.ReduceOp.SUM

    def of(self, tensors: list[Tensor], device: torch.device) -> Tensor:
        # A rank may have no row of a short parameter, and the largest of nothing is not defined.
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
    """A mesh with one axis of shards, or with replicas of shards (hybrid sharding)."""
    size = context.group.size
    sizes = context.config.parallelism_config
    replicas = sizes.dp_replicate_size if sizes else 1
    shards = sizes.dp_shard_size if sizes and sizes.dp_shard_size > 1 else size // replicas
    if replicas * shards != size:
        raise PrepareError(
            f"parallelism_config has {replicas} replicas x {shards} shards for {size} ranks",
            "The sizes must multiply to the number of ranks",
            f"Leave dp_shard_size out, and make dp_replicate_size a divisor of {size}",
        )
    if replicas == 1:
        return init_device_mesh(context.device.type, (size,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(context.device.type, (replicas, shards), mesh_dim_names=("dp_replicate", "dp_shard"))


def _mixed_precision(context: RunContext, plugin: FullyShardedDataParallelPlugin) -> MixedPrecisionPolicy:
    """Compute in the run's precision, and reduce gradients in fp32 unless the plugin says otherwise.

    The output keeps its dtype: rounding it would round the loss that users log by up to 0.4 %.
    """
    policy = context.precision
    compute = DTYPES[plugin.param_dtype] if plugin.param_dtype else None
    if compute is None and policy.mode != "no":
        compute = policy.compute_dtype
    reduce = DTYPES[plugin.reduce_dtype] if plugin.reduce_dtype else None
    if reduce is None and compute is not None:
        reduce = torch.float32
    output = DTYPES[plugin.output_dtype] if plugin.output_dtype else None
    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, output_dtype=output)
