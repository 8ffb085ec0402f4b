"""DeepSpeed's engine shards optimizer states, gradients and parameters (ZeRO), and may keep them in host memory.

The engine owns backward and step; what a step *is* stays paceline's: the window, true means, clipping, skipped steps
and the scheduler are the same as under every other strategy. So the engine is told that a window has one
micro-batch and that nothing is to be clipped, and this class says where a window ends and clips by itself.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import override

from paceline.checkpoint.parts import OptimizerState, Part
from paceline.config import DeepSpeedPlugin
from paceline.environment.device import describe_device
from paceline.errors import (
    ForeignOptimizerError,
    MissingExtraError,
    PrecisionError,
    PrepareError,
    StateError,
    SteppingError,
    named,
)
from paceline.precision import autocast_forward
from paceline.strategies.base import DistributedType, Strategy, check_trainable, multiply, refuse_join, short_dtype
from paceline.strategies.compiled import compile_model
from paceline.strategies.deepspeed_settings import Known, hidden_size_of, resolve_scheduler, resolve_settings
from paceline.strategies.dummies import DummyOptim, DummyScheduler
from paceline.strategies.state import check_groups, options_of, saved_buffers, take_options
from paceline.strategies.transformers_init import announce
from paceline.strategies.zero import norm_of, partitions_of, piece_of

try:
    from deepspeed.accelerator import get_accelerator

    import deepspeed
except ImportError as error:
    raise MissingExtraError("deepspeed", "deepspeed", "strategy='deepspeed'") from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.optim import Optimizer

    from paceline.checkpoint.parts import Number, Slot
    from paceline.strategies.base import Surroundings
    from paceline.strategies.zero import Partitions, Place

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_ZERO_OPTIMIZERS = {"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"}


@dataclass(slots=True, eq=False)
class _Engine:
    """One model in training: its engine, and what went into it."""

    engine: Any
    model: nn.Module
    given: Optimizer
    partitions: Partitions
    groups: list[list[nn.Parameter]]
    dtypes: dict[int, torch.dtype]
    # Where it is in a window: whether the next backward ends it, whether one did, and whether it was clipped.
    ends: bool = True
    ended: bool = False
    clipped: bool = False
    # Whether a forward ran whose loss has not come back yet.
    pending: bool = False
    steps: dict[int, tuple[Place, list[Tensor]]] = field(default_factory=dict)

    @property
    def optimizer(self) -> Any:
        """The optimizer that holds the states: the user's own, or the one that the configuration describes."""
        return self.engine.basic_optimizer


class DeepSpeedStrategy(Strategy):
    """ZeRO: stage 1 shards the optimizer's states, 2 gradients as well, 3 parameters as well."""

    name = "deepspeed"

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__(surroundings)
        self._plugin = surroundings.config.deepspeed_config or DeepSpeedPlugin()
        self._stage = self._plugin.zero_stage
        self._engines: list[_Engine] = []
        self._references: list[Any] = []
        self._settings: dict[str, Any] = {}
        self._check_surroundings()
        _prepare_package()
        _name_ranks()
        self._announced = announce(self._early_settings()) if self._shards_while_building else None

    @property
    @override
    def distributed_type(self) -> DistributedType:
        return DistributedType.DEEPSPEED

    @property
    @override
    def scales_loss(self) -> bool:  # type: ignore[override]
        return self._dtype == torch.float16

    @property
    @override
    def settings(self) -> dict[str, Any]:
        """DeepSpeed's configuration with every `auto` filled in, as the user would write it.

        Empty until a model was prepared.
        """
        return copy.deepcopy(self._settings)

    @property
    def _dtype(self) -> torch.dtype | None:
        """The dtype of the parameters that the forward uses, where that is not fp32."""
        return _DTYPES.get(self.around.precision.mode) if self._stage > 0 else None

    @property
    def _shards_while_building(self) -> bool:
        flag = self._plugin.zero3_init_flag
        return self._stage == 3 and (flag is None or flag)

    def _check_surroundings(self) -> None:
        device = self.around.device
        engine = get_accelerator().device_name()
        if engine != device.type:
            raise PrepareError(
                f"DeepSpeed has chosen the accelerator {engine}, and this run computes on {device.type}",
                "DeepSpeed decides when it is imported",
                f"Start the script with `paceline launch`, or set DS_ACCELERATOR={device.type} before it starts",
            )
        if self.around.precision.mode == "fp16":
            if not get_accelerator().is_fp16_supported():
                raise PrecisionError("fp16", f"DeepSpeed on {describe_device(device)}", {"no", "bf16"})
            if self._stage == 0:
                raise PrepareError(
                    "mixed_precision='fp16' with zero_stage 0",
                    "DeepSpeed scales the loss in its sharded optimizers only",
                    "Use zero_stage 1, 2 or 3, mixed_precision='bf16', or strategy='ddp'",
                )

    # What becomes of models and optimizers

    @override
    def prepare(
        self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer], *, place: Sequence[bool]
    ) -> list[nn.Module]:
        taken = {id(bound.given) for bound in self._engines}
        free = [optimizer for optimizer in optimizers if id(optimizer) not in taken]
        prepared: list[nn.Module] = []
        for model, move in zip(models, place, strict=True):
            check_trainable(model)
            optimizer = self._optimizer_for(model, free)
            free = [other for other in free if other is not optimizer]
            prepared.append(self._build(model, optimizer, move=move))
            self._models.append(model)
            self._parameters = None
        # An optimizer may wait for its model; one whose model has an engine already comes too late.
        late = next((optimizer for optimizer in free if any(_holds(optimizer, b.model) for b in self._engines)), None)
        if late is not None:
            raise PrepareError(
                f"{type(late).__name__} was prepared after its model",
                "DeepSpeed's engine is built from a model and its optimizer together",
                "Pass both to one call: prepare(model, optimizer)",
            )
        return prepared

    def _optimizer_for(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> Optimizer:
        own = {id(p) for p in model.parameters()}
        matching = [optimizer for optimizer in optimizers if _holds(optimizer, model)]
        if len(matching) == 1 and all(id(p) in own for p in _parameters_in(matching[0])):
            return matching[0]
        if len(optimizers) == 1 and not matching:
            held = _parameters_in(optimizers[0])
            raise ForeignOptimizerError([tuple(p.shape) for p in held], len(held))
        saw = f"{type(model).__name__} was prepared with {len(matching)} optimizers of its parameters"
        if len(matching) == 1:
            saw = f"{type(matching[0]).__name__} holds parameters of {type(model).__name__} and of other models"
        raise PrepareError(
            saw,
            "DeepSpeed's engine trains one model with one optimizer",
            "Pass both to one call, prepare(model, optimizer), with one optimizer for each model; for a model that "
            "is not trained use prepare_model(model, evaluation_mode=True)",
        )

    def _build(self, model: nn.Module, optimizer: Optimizer, *, move: bool) -> nn.Module:
        if not move:
            raise PrepareError(
                f"device_placement=False was given for {type(model).__name__}",
                "DeepSpeed places what it shards",
                "Leave device_placement out",
            )
        groups = [list(group["params"]) for group in optimizer.param_groups]
        dtypes = {id(p): self._dtype_of(p) for p in model.parameters()}
        exact = self._exact_values(model)
        known = Known(
            world_size=self.around.group.size,
            micro_batch=self.micro_batch,
            hidden_size=hidden_size_of(model),
            optimizer=optimizer,
            on_cpu=self.around.device.type == "cpu",
        )
        self._settings = resolve_settings(self._plugin, self.around.config, known)
        self._check_compiler(optimizer)
        self._check_disk()
        self._mark_leaves(model)
        _configure_checkpointing(self._settings)
        stand_in = isinstance(optimizer, DummyOptim)
        compile_model(model, self.around.config.dynamo_config)
        engine = self._initialize(
            model=model,
            optimizer=None if stand_in else optimizer,
            model_parameters=_as_groups(optimizer) if stand_in else None,
            config=self._engine_settings(stand_in=stand_in),
        )
        bound = _Engine(engine, model, optimizer, partitions_of(engine, self._stage), groups, dtypes)
        engine.set_gradient_accumulation_boundary(True)
        self._watch(bound)
        self._engines.append(bound)
        self._restore_exact(bound, exact)
        prepared: nn.Module = engine
        return prepared

    def _dtype_of(self, parameter: nn.Parameter) -> torch.dtype:
        """The dtype to save a parameter in: its own, but that one built sharded got 16 bits from the engine only."""
        own = parameter.dtype
        return torch.float32 if hasattr(parameter, "ds_id") and own == self._dtype else own

    def _initialize(self, **arguments: Any) -> Any:
        return deepspeed.initialize(**arguments)[0]

    def _exact_values(self, model: nn.Module) -> dict[int, Tensor] | None:
        """The main rank's fp32 values, which the engine is about to round to 16 bits; None where nothing is rounded."""
        if self._dtype is None or any(hasattr(p, "ds_id") for p in model.parameters()):
            return None
        if not self.around.world.is_main:
            return {}
        return {id(p): p.detach().cpu() for p in model.parameters() if p.dtype == torch.float32}

    @torch.no_grad()
    def _restore_exact(self, bound: _Engine, exact: Mapping[int, Tensor] | None) -> None:
        """Start the optimizer's fp32 values from the model's own, which the engine took from their rounding.

        One parameter at a time is whole on the device.
        """
        if exact is None:
            return
        device = self.around.device
        for parameter in bound.model.parameters():
            if bound.dtypes[id(parameter)] != torch.float32 or bound.partitions.place(parameter) is None:
                continue
            part = bound.partitions.value(parameter)
            known = exact.get(id(parameter))
            whole = torch.empty(part.numel, device=device) if known is None else known.reshape(-1).to(device)
            self.around.group.broadcast(whole)
            part.values.copy_(whole[part.start : part.stop])

    def _engine_settings(self, *, stand_in: bool) -> dict[str, Any]:
        """What the engine is told: paceline's own part of the work is switched off in it."""
        told = copy.deepcopy(self._settings)
        told["train_batch_size"] = told["train_micro_batch_size_per_gpu"] * self.around.group.size
        told["gradient_accumulation_steps"] = 1
        told["gradient_clipping"] = 0.0
        told.pop("scheduler", None)
        if not stand_in:
            told.pop("optimizer", None)
        if self._stage == 0:
            # fp32 parameters under autocast, as under DDP.
            told.pop("bf16", None)
            told.pop("fp16", None)
        zero = told.setdefault("zero_optimization", {})
        zero["stage"] = self._stage
        accumulates = told.get("data_types", {}).get("grad_accum_dtype")
        if self._stage in (1, 2) and not zero.get("offload_optimizer") and accumulates is None:
            # The norm is computed where it is asked for, by clip_grad_norm_.
            zero.setdefault("compute_grad_norm", False)
        # The throughput timer waits for the device in every step.
        told.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
        return told

    def _early_settings(self) -> dict[str, Any]:
        """What is known before a model is there, for building it sharded."""
        dtype = self.around.precision.mode
        zero = {"stage": 3}
        offload = self._plugin.zero_section().get("offload_param")
        if offload is not None:
            zero["offload_param"] = offload
        told: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        if dtype in _DTYPES:
            told[dtype] = {"enabled": True}
        return told

    def _check_compiler(self, optimizer: Optimizer) -> None:
        """Say what is missing before DeepSpeed builds an operation of its own.

        Raises:
            PrepareError: The configuration asks for DeepSpeed's own optimizer and there is no compiler.
        """
        section = self._settings.get("optimizer") if isinstance(optimizer, DummyOptim) else None
        kind = (section or {}).get("type", "")
        parameters = (section or {}).get("params", {})
        if section is None or parameters.get("torch_adam") or kind not in _ZERO_OPTIMIZERS:
            return
        missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
        if missing:
            raise PrepareError(
                f"The DeepSpeed configuration asks for its own {kind}, and {' and '.join(missing)} is not on PATH",
                "DeepSpeed compiles that optimizer when it is first used",
                'Install them, write "torch_adam": true into optimizer.params, or pass an optimizer of torch',
            )

    def _check_disk(self) -> None:
        """Say what is missing before DeepSpeed builds the operation that reads and writes NVMe.

        Raises:
            PrepareError: The configuration offloads to NVMe, and this machine cannot compile for it.
        """
        zero = self._settings["zero_optimization"]
        parts = [part for part in ("optimizer", "param") if zero.get(f"offload_{part}", {}).get("device") == "nvme"]
        if not parts:
            return
        from deepspeed.ops.op_builder import AsyncIOBuilder

        with warnings.catch_warnings():
            # The check compiles with distutils, which warns about itself.
            warnings.simplefilter("ignore")
            fits = AsyncIOBuilder().is_compatible(verbose=False)
        if not fits:
            raise PrepareError(
                f"offload_{parts[0]}_device is nvme",
                "DeepSpeed compiles its operation async_io for that, and the headers or the library libaio are missing",
                "Install libaio-dev (Debian) or libaio-devel (Fedora), or offload to cpu",
            )

    def _mark_leaves(self, model: nn.Module) -> None:
        """Gather mixture-of-experts blocks as a whole: ranks take different ways through them."""
        asked = self._plugin.transformer_moe_cls_names
        if not asked or self._stage != 3:
            return
        found = {type(module).__name__: type(module) for module in model.modules()}
        missing = [name for name in asked if name not in found]
        if missing:
            raise PrepareError(
                f"deepspeed_moe_layer_cls_names names {named(missing)}",
                f"{type(model).__name__} has no module of that class",
                f"Its classes are {named(sorted(found), 20)}",
            )
        deepspeed.utils.set_z3_leaf_modules(model, [found[name] for name in asked])

    def _watch(self, bound: _Engine) -> None:
        """Note which engines a loss may come from, and hand 16-bit models 16-bit inputs."""

        def before(_module: nn.Module, inputs: Any, keywords: Any) -> Any:
            if torch.is_grad_enabled():
                bound.pending = True
            return None if self._dtype is None else (self._cast(inputs), self._cast(keywords))

        bound.model.register_forward_pre_hook(before, with_kwargs=True)
        if self._dtype is None:
            autocast_forward(bound.model, self.around.precision)

    def _cast(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(self._dtype) if value.is_floating_point() else value
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return type(value)(self._cast(item) for item in value)
        if type(value) is dict:
            return {key: self._cast(item) for key, item in value.items()}
        return value

    @override
    def prepare_model(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        raise PrepareError(
            f"{type(model).__name__} was prepared without an optimizer",
            "DeepSpeed's engine is built from a model and its optimizer together",
            "Pass both to one call: prepare(model, optimizer)",
        )

    @override
    def prepare_evaluation(self, model: nn.Module, *, place: bool = True) -> nn.Module:
        if not any(hasattr(p, "ds_id") for p in model.parameters()):
            return super().prepare_evaluation(model, place=place)
        engine = self._initialize(model=model, config=self._early_settings())
        self._references.append(engine)
        prepared: nn.Module = engine
        return prepared

    @override
    def unwrap(self, model: nn.Module) -> nn.Module:
        return model.module if isinstance(model, deepspeed.DeepSpeedEngine) else model

    @override
    def parameters_of(self, optimizer: Optimizer) -> list[nn.Parameter]:
        bound = self._find(optimizer)
        return super().parameters_of(optimizer) if bound is None else [p for group in bound.groups for p in group]

    @override
    def successor(self, optimizer: Optimizer) -> Optimizer:
        bound = self._find(optimizer)
        if bound is None or not isinstance(optimizer, DummyOptim):
            return optimizer
        made: Optimizer = bound.optimizer
        return made

    @override
    def adopt_scheduler(self, scheduler: Any) -> Any:
        described = self._settings.get("scheduler")
        if not isinstance(scheduler, DummyScheduler):
            if described is not None:
                raise PrepareError(
                    f"{type(scheduler).__name__} was prepared, and the DeepSpeed configuration has a scheduler section",
                    "One of the two would silently lose",
                    "Prepare a DummyScheduler in its place, or remove the section",
                )
            return scheduler
        scheduler.optimizer = optimizer = self.successor(scheduler.optimizer)
        if scheduler.lr_scheduler_callable is not None:
            return scheduler.lr_scheduler_callable(optimizer)
        if described is None:
            raise PrepareError(
                "A DummyScheduler was prepared",
                "It stands for the scheduler section of the DeepSpeed configuration, and there is none",
                "Add the section, or pass a scheduler of torch.optim.lr_scheduler",
            )
        section = resolve_scheduler(self._settings, scheduler)
        self._settings["scheduler"] = section
        return _make_scheduler(section, optimizer)

    def _find(self, optimizer: object) -> _Engine | None:
        return next((b for b in self._engines if b.given is optimizer or b.optimizer is optimizer), None)

    def _engine_of(self, model: nn.Module) -> _Engine | None:
        return next((b for b in self._engines if b.engine is model or b.model is model), None)

    # Models that are built sharded

    @override
    @contextmanager
    def init_module(self) -> Iterator[None]:
        if self._stage != 3:
            yield
            return
        with deepspeed.zero.Init(config_dict_or_path=self._early_settings()):
            yield

    @override
    def gather_parameters(
        self, parameters: Sequence[nn.Parameter], modifier_rank: int | None
    ) -> AbstractContextManager[Any]:
        if self._stage != 3:
            return super().gather_parameters(parameters, modifier_rank)
        return self._gathered(list(parameters), modifier_rank)

    @contextmanager
    def _gathered(self, parameters: list[nn.Parameter], modifier_rank: int | None) -> Iterator[None]:
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank):
            yield
        if modifier_rank is None:
            return
        # The optimizer's fp32 values follow, or the next step would undo the change.
        for bound in self._engines:
            for parameter in parameters:
                if bound.partitions.place(parameter) is not None:
                    bound.partitions.value(parameter).values.copy_(piece_of(parameter).values)

    # One step

    @override
    def set_gradient_sync(self, model: nn.Module, enabled: bool) -> None:
        bound = self._engine_of(model)
        if bound is not None:
            bound.ends = enabled
            bound.engine.set_gradient_accumulation_boundary(enabled)

    @override
    def backward(self, loss: Tensor, scale: Tensor | None = None, **kwargs: Any) -> None:
        retain = kwargs.pop("retain_graph", False)
        if kwargs or loss.ndim:
            saw = f"backward() got {', '.join(kwargs)}" if kwargs else f"backward() got a loss of shape {[*loss.shape]}"
            raise SteppingError(
                saw,
                "DeepSpeed's engine computes the gradients of one number and takes only retain_graph",
                "Pass a loss of shape [], or use another strategy",
            )
        bound = self._source()
        if bound.ended:
            raise SteppingError(
                f"backward() was called again on {type(bound.model).__name__} after the backward that ended its window",
                "DeepSpeed's engine would forget the gradients of the first one",
                "Add the losses up and call backward() once, or train under accumulate() without sync_each_batch",
            )
        bound.pending, bound.clipped, bound.ended = False, False, bound.ends
        bound.engine.backward(loss if scale is None else loss * scale, retain_graph=retain, scale_wrt_gas=False)

    def _source(self) -> _Engine:
        """The engine that this loss comes from: the one whose forward ran since its last backward."""
        if len(self._engines) == 1:
            return self._engines[0]
        pending = [bound for bound in self._engines if bound.pending]
        if len(pending) == 1:
            return pending[0]
        names = ", ".join(type(bound.model).__name__ for bound in pending) or "none"
        raise SteppingError(
            f"backward() was called after the forward of several trained models: {names}",
            "Each has its own DeepSpeed engine, which must run the backward of its own loss",
            "Call forward and backward of one model before the forward of the next, with torch.no_grad() around a "
            "forward that needs no gradient; or use strategy='fsdp'",
        )

    def _runs(self, parameters: Iterable[nn.Parameter]) -> list[tuple[_Engine, list[Tensor]]]:
        """This rank's runs of the gradients of some parameters, engine by engine."""
        asked = {id(p) for p in parameters}
        found = []
        for bound in self._engines:
            held = [bound.partitions.gradient(p) for group in bound.groups for p in group if id(p) in asked]
            found.append((bound, [gradient for gradient in held if gradient is not None]))
        return found

    @override
    @torch.no_grad()
    def scale_gradients(self, parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
        for _, runs in self._runs(parameters):
            multiply(runs, factor)

    @override
    @torch.no_grad()
    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float) -> Tensor:
        self._check_clip(max_norm)
        found = self._runs(parameters)
        device = self.around.device
        largest = norm_type == float("inf")
        total = torch.zeros((), device=device)
        for bound, runs in found:
            share = norm_of(runs, norm_type, device)
            if bound.partitions.cut:
                self.around.group.all_reduce(share, "max" if largest else "sum")
            scale = bound.partitions.loss_scale
            share = share / (scale if largest else scale**norm_type)
            total = torch.maximum(total, share) if largest else total + share
            bound.clipped = True
        total = total if largest else total.pow(1.0 / norm_type)
        # The same guard as torch.nn.utils.clip_grad_norm_.
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for _, runs in found:
            multiply(runs, factor)
        return total

    def _check_clip(self, max_norm: float) -> None:
        """One owner for the largest norm: the script, or the configuration."""
        asked = self._clipping
        if asked is not None and max_norm not in (asked, float("inf")):
            raise SteppingError(
                f"clip_grad_norm_(max_norm={max_norm:g}) was called, and the DeepSpeed configuration says "
                f"gradient_clipping {asked:g}",
                "Only one of them can hold",
                'Write "auto" into the configuration, or pass the same value',
            )

    @property
    def _clipping(self) -> float | None:
        """The largest norm that the configuration asks for; None where the script decides."""
        asked = self._plugin.gradient_clipping
        return float(asked) if isinstance(asked, (int, float)) and asked > 0 else None

    @override
    @torch.no_grad()
    def clip_value(self, parameters: Iterable[nn.Parameter], value: float) -> None:
        for bound, runs in self._runs(parameters):
            limit = value * bound.partitions.loss_scale
            for run in runs:
                run.clamp_(-limit, limit)

    @override
    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None:
            raise SteppingError(
                "optimizer.step(closure) was called under DeepSpeed",
                "Its engine computes the gradients before the step and cannot compute them again inside",
                "Use an optimizer that needs no closure, or strategy='ddp'",
            )
        bound = self._find(optimizer)
        assert bound is not None
        asked = self._clipping
        if asked is not None and not bound.clipped:
            self.clip_norm([p for group in bound.groups for p in group], asked, 2.0)
        bound.engine.step()
        bound.ended = False
        return None

    @override
    def step_was_skipped(self, optimizer: Optimizer) -> bool:
        bound = self._find(optimizer)
        return bound is not None and bool(getattr(bound.engine.optimizer, "overflow", False))

    @override
    def zero_grad(self, optimizer: Optimizer, set_to_none: bool = True) -> None:
        bound = self._find(optimizer)
        assert bound is not None
        bound.partitions.drop_gradients()
        bound.ended = False

    @override
    def join(self, models: Sequence[nn.Module]) -> AbstractContextManager[Any]:
        raise refuse_join("DeepSpeed")

    # State, in and out

    @override
    def model_state(self, model: nn.Module) -> dict[str, Part]:
        bound = self._engine_of(model)
        inner = self.unwrap(model)
        parts = {name: self._value(bound, parameter) for name, parameter in inner.named_parameters()}
        return parts | {name: Part.whole(buffer) for name, buffer in saved_buffers(inner)}

    @staticmethod
    def _value(bound: _Engine | None, parameter: nn.Parameter) -> Part:
        if bound is not None:
            return bound.partitions.value(parameter)
        return piece_of(parameter) if hasattr(parameter, "ds_id") else Part.whole(parameter)

    @override
    def optimizer_state(self, optimizer: Optimizer, names: Mapping[int, str]) -> OptimizerState:
        bound = self._bound(optimizer)
        state = OptimizerState()
        bound.steps.clear()
        for index, group in enumerate(bound.groups):
            held = {key: value for key, value in bound.optimizer.param_groups[index].items() if _is_option(key)}
            state.groups.append({**options_of(held), "params": [names[id(p)] for p in group]})
            for parameter in group:
                place = bound.partitions.place(parameter)
                if place is not None:
                    self._collect(bound, names[id(parameter)], parameter, place, state)
        return state

    def _collect(self, bound: _Engine, name: str, parameter: nn.Parameter, place: Place, state: OptimizerState) -> None:
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        held = bound.optimizer.state.get(place.flat, {})
        slots: dict[str, Part] = {}
        numbers: dict[str, Number] = {}
        for key, value in held.items():
            if key == "step":
                continue
            if isinstance(value, torch.Tensor) and value.numel() == place.flat.numel() and value.ndim:
                slots[key] = Part(shape, place.start, place.cut(value))
            elif isinstance(value, (int, float, bool)) or value is None:
                numbers[key] = value
            else:
                raise StateError(
                    f"{type(bound.optimizer).__name__} keeps {key!r} as {type(value).__name__}",
                    "ZeRO cuts flat tensors, and this is neither one as large as the parameters nor a number",
                    "Use an optimizer that keeps one value for each element, as Adam and SGD do",
                )
        # Some optimizers of DeepSpeed count their steps in the group.
        step = held.get("step", bound.optimizer.param_groups[place.group].get("step") if slots else None)
        if step is not None:
            counted = torch.tensor(float(step), dtype=torch.float32)
            bound.steps.setdefault(id(place.flat), (place, []))[1].append(counted)
            slots["step"] = Part.whole(counted)
        if slots:
            state.slots[name] = slots
        if numbers:
            state.numbers[name] = numbers

    @override
    def make_slots(
        self,
        optimizer: Optimizer,
        names: Mapping[int, str],
        slots: Mapping[str, Mapping[str, Slot]],
        numbers: Mapping[str, Mapping[str, Number]],
    ) -> None:
        bound = self._bound(optimizer)
        wanted: dict[int, tuple[Place, dict[str, Slot], dict[str, Number]]] = {}
        for group in bound.groups:
            for parameter in group:
                place, name = bound.partitions.place(parameter), names[id(parameter)]
                if place is not None:
                    _, tensors, counts = wanted.setdefault(id(place.flat), (place, {}, {}))
                    tensors.update(slots.get(name, {}))
                    counts.update(numbers.get(name, {}))
        for place, tensors, counts in wanted.values():
            self._make_room(bound, place, tensors, counts)

    @staticmethod
    def _make_room(bound: _Engine, place: Place, tensors: dict[str, Slot], counts: dict[str, Number]) -> None:
        before = bound.optimizer.state.get(place.flat, {})
        held: dict[str, Any] = {}
        for key, slot in tensors.items():
            if key == "step":
                held[key] = before.get(key, _first_step(bound.optimizer))
            elif slot.shape == ():
                raise StateError(
                    f"The saved state has a single number {key!r} for each parameter",
                    "ZeRO keeps one for all parameters of a group",
                    "Load it under strategy='fsdp' or 'ddp'",
                )
            else:
                held[key] = before[key] if key in before else torch.zeros_like(place.flat, dtype=slot.dtype)
        held.update(counts)
        if "step" in held and "step" in bound.optimizer.param_groups[place.group]:
            del held["step"]
        bound.optimizer.state[place.flat] = held
        # DeepSpeed looks its fragments of the states up again after the next step.
        if hasattr(bound.engine.optimizer, "_hp_optimizer_states_linked"):
            bound.engine.optimizer._hp_optimizer_states_linked = False

    @override
    def set_groups(self, optimizer: Optimizer, names: Mapping[int, str], groups: Sequence[Mapping[str, Any]]) -> None:
        bound = self._bound(optimizer)
        mine = [[names[id(p)] for p in group] for group in bound.groups]
        check_groups(mine, groups)
        for held, saved in zip(bound.optimizer.param_groups, groups, strict=True):
            take_options(held, saved)

    @override
    def state_written(self) -> None:
        for bound in self._engines:
            for place, counts in bound.steps.values():
                self._write_steps(bound, place, {float(count) for count in counts})
            bound.steps.clear()
            bound.partitions.publish()

    @override
    def engine_state(self) -> dict[str, Any]:
        return {"loss_scalers": [_scaler_state(bound.engine.optimizer) for bound in self._engines]}

    @override
    def load_engine_state(self, state: Mapping[str, Any]) -> None:
        for bound, held in zip(self._engines, state.get("loss_scalers", ()), strict=False):
            scaler = getattr(bound.engine.optimizer, "loss_scaler", None)
            for key in _SCALER_FIELDS:
                if key in held and hasattr(scaler, key):
                    setattr(scaler, key, held[key])

    @staticmethod
    def _write_steps(bound: _Engine, place: Place, counts: set[float]) -> None:
        if len(counts) > 1:
            raise StateError(
                f"Parameters of one group were saved after {', '.join(f'{c:g}' for c in sorted(counts))} steps",
                "ZeRO counts steps for all parameters of a group together",
                "Give them groups of their own, or load under strategy='fsdp'",
            )
        (count,) = counts
        held, group = bound.optimizer.state[place.flat], bound.optimizer.param_groups[place.group]
        if "step" in group:
            group["step"] = int(count)
        elif isinstance(held.get("step"), torch.Tensor):
            held["step"].fill_(count)
        else:
            held["step"] = int(count)

    def _bound(self, optimizer: Optimizer) -> _Engine:
        bound = self._find(optimizer)
        if bound is None:
            raise StateError(f"The state of a {type(optimizer).__name__} was asked for that was not prepared")
        return bound

    @override
    @torch.no_grad()
    def gather_state(self, model: nn.Module) -> dict[str, Tensor]:
        bound = self._engine_of(model)
        state: dict[str, Tensor] = {}
        cut = {name for name, p in self.unwrap(model).named_parameters() if self._is_cut(bound, p)}
        for name, part in self.model_state(model).items():
            whole = self._gather(part) if name in cut else part.values.reshape(part.shape).cpu()
            if self.around.world.is_main:
                state[name] = whole
        if not state:
            return {}
        self._round(bound, self.unwrap(model), state)
        for alias, first in self.tied_names(model).items():
            state[alias] = state[first]
        return state

    @staticmethod
    def _is_cut(bound: _Engine | None, parameter: nn.Parameter) -> bool:
        """Whether ranks hold different runs of a parameter: the same answer on all of them."""
        if hasattr(parameter, "ds_id"):
            return True
        return bound is not None and bound.partitions.cut and bound.partitions.place(parameter) is not None

    def _gather(self, part: Part) -> Tensor:
        """The whole tensor on the CPU, from the runs of all ranks; exact to the bit. Collective."""
        # Added up as integers, since 0.0 + -0.0 would lose a sign; widening to fp32 and back loses nothing.
        bits = torch.zeros(part.numel, dtype=torch.int32, device=self.around.device)
        run = part.flat().to(self.around.device, torch.float32).view(torch.int32)
        bits[part.start : part.stop] = run
        self.around.group.all_reduce(bits, "sum")
        return bits.view(torch.float32).to(part.dtype).view(part.shape).cpu()

    def _round(self, bound: _Engine | None, inner: nn.Module, state: dict[str, Tensor]) -> None:
        """Give weights the dtype they came in, or 16 bits where the configuration asks for it."""
        if bound is None:
            return
        short = self._dtype if self._plugin.zero3_save_16bit_model else None
        for name, parameter in inner.named_parameters():
            state[name] = state[name].to(short or bound.dtypes.get(id(parameter), state[name].dtype))

    # What others want to know

    @override
    def describe(self) -> list[str]:
        size = self.around.group.size
        held = ["whole on each", "optimizer states cut over", "optimizer states and gradients cut over"]
        shards = [*held, "parameters, gradients and optimizer states cut over"][self._stage]
        line = f"DeepSpeed {deepspeed.__version__}, ZeRO stage {self._stage}: {shards} of {size} ranks"
        zero = self._plugin.zero_section()
        away = [
            f"{what} on {zero[key]['device']}"
            for key, what in (("offload_optimizer", "optimizer"), ("offload_param", "parameters"))
            if zero.get(key, {}).get("device", "none") != "none"
        ]
        return ["; ".join([line, *away])]

    @override
    def dtypes(self) -> dict[str, str]:
        table = super().dtypes()
        if self._dtype is not None:
            short = short_dtype(self._dtype)
            reduce = self._settings.get("communication_data_type") or short
            table |= {"stored": short, "compute": short, "reduce": reduce, "optimizer": "fp32", "saved": "fp32"}
            if self._plugin.zero3_save_16bit_model:
                table["saved"] = short
        return table


def _parameters_in(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _holds(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer updates any parameter of a model."""
    own = {id(p) for p in model.parameters()}
    return any(id(p) in own for p in _parameters_in(optimizer))


def _scaler_state(optimizer: Any) -> dict[str, Any]:
    """How far dynamic loss scaling has come; nothing outside fp16."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return {key: getattr(scaler, key) for key in _SCALER_FIELDS if hasattr(scaler, key)}


def _prepare_package() -> None:
    """Keep DeepSpeed from compiling what nobody asked for, and from logging its configuration."""
    # On a CPU its first use compiles shared-memory collectives with g++, for two minutes; gloo's do.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    if logger.level in (logging.NOTSET, logging.INFO):
        logger.setLevel(logging.WARNING)


def _name_ranks() -> None:
    """Give DeepSpeed the variables that it reads in the middle of training, in a process that nobody launched.

    The only variables that paceline writes: DeepSpeed has no other way in.
    """
    if "LOCAL_RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")


def _make_scheduler(section: Mapping[str, Any], optimizer: Optimizer) -> Any:
    from deepspeed.runtime import lr_schedules

    kind = section["type"]
    made = getattr(lr_schedules, kind, None) or getattr(torch.optim.lr_scheduler, kind, None)
    if made is None:
        raise PrepareError(
            f"scheduler.type={kind!r} in the DeepSpeed configuration",
            "Neither DeepSpeed nor torch has such a scheduler",
            f"Choose one of {', '.join(lr_schedules.VALID_LR_SCHEDULES)}",
        )
    return made(optimizer, **section.get("params", {}))


def _configure_checkpointing(settings: Mapping[str, Any]) -> None:
    """Pass the section on to `deepspeed.checkpointing`, which models call by themselves."""
    section = settings.get("activation_checkpointing")
    if section:
        deepspeed.checkpointing.configure(
            None,
            partition_activations=section.get("partition_activations"),
            contiguous_checkpointing=section.get("contiguous_memory_optimization"),
            num_checkpoints=section.get("number_checkpoints"),
            checkpoint_in_cpu=section.get("cpu_checkpointing"),
            synchronize=section.get("synchronize_checkpoint_boundary"),
            profile=section.get("profile"),
        )


def _as_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """A stand-in's groups without the options that the configuration decides."""
    return [{"params": group["params"]} for group in optimizer.param_groups]


def _is_option(key: str) -> bool:
    return key not in ("params", "step") and not key.startswith("_ds_")


def _first_step(optimizer: Optimizer) -> Any:
    """A count of steps as this optimizer keeps it: torch's in a tensor, DeepSpeed's in a number."""
    return torch.zeros((), dtype=torch.float32) if type(optimizer).__module__.startswith("torch.") else 0
