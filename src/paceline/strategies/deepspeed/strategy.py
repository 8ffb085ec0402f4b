"""DeepSpeed's engine shards optimizer states, gradients and parameters (ZeRO), and may keep them in host memory.

The engine owns backward and step; what a step *is* stays paceline's: the window, true means, clipping, skipped steps
and the scheduler are the same as under every other strategy. So the engine is told that a window has one
micro-batch and that nothing is to be clipped, and this class says where a window ends and clips by itself.
A step (`deepspeed_stepping`) and the training state (`deepspeed_state`) are parts of the class in files of their own.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import override

from paceline.config import DeepSpeedPlugin
from paceline.environment.device import describe_device
from paceline.errors import (
    ForeignOptimizerError,
    MissingExtraError,
    PrecisionError,
    PrepareError,
    SteppingError,
    named,
)
from paceline.precision import autocast_forward
from paceline.strategies.base import check_trainable, short_dtype
from paceline.strategies.compilation import compile_model
from paceline.strategies.context import DistributedType
from paceline.strategies.deepspeed.build import (
    as_bytes,
    as_groups,
    cast_inputs,
    check_compiler,
    check_disk,
    check_dtypes,
    check_monitors,
    configure_checkpointing,
    early_settings,
    engine_settings,
    exact_values,
    holds,
    make_scheduler,
    mark_leaves,
    name_ranks,
    parameters_in,
    prepare_package,
    restore_exact,
)
from paceline.strategies.deepspeed.engine import ZeroEngine, let_go
from paceline.strategies.deepspeed.partitions import partitions_of, piece_of
from paceline.strategies.deepspeed.settings import Known, hidden_size_of, resolve_scheduler, resolve_settings
from paceline.strategies.deepspeed.transformers import announce
from paceline.strategies.deepspeed_state import EngineState
from paceline.strategies.deepspeed_stepping import EngineStepping
from paceline.strategies.placeholders import DummyOptim, DummyScheduler

try:
    import deepspeed
    from deepspeed.accelerator import get_accelerator
except ImportError as error:
    raise MissingExtraError("deepspeed", "deepspeed", "strategy='deepspeed'") from error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch.optim import Optimizer

    from paceline.strategies.context import RunContext


class DeepSpeedStrategy(EngineStepping, EngineState):
    """ZeRO: stage 1 shards the optimizer's states, 2 gradients as well, 3 parameters as well."""

    name = "deepspeed"
    prepares_again = False
    keeps_gradients = True

    def __init__(self, surroundings: RunContext) -> None:
        super().__init__(surroundings)
        self._plugin = surroundings.config.deepspeed_config or DeepSpeedPlugin()
        self._stage = self._plugin.zero_stage
        self._engines = []
        self._references: list[Any] = []
        self._settings = {}
        self._scheduled = False
        self._check_surroundings()
        prepare_package()
        name_ranks()
        self._early = early_settings(self._plugin, self.context.precision.mode)
        self._announced = announce(self._early) if self._shards_while_building else None

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
    def _shards_while_building(self) -> bool:
        flag = self._plugin.zero3_init_flag
        return self._stage == 3 and (flag is None or flag)

    def _check_surroundings(self) -> None:
        device = self.context.device
        engine = get_accelerator().device_name()
        if engine != device.type:
            raise PrepareError(
                f"DeepSpeed has chosen the accelerator {engine}, and this run computes on {device.type}",
                "DeepSpeed decides when it is imported",
                f"Start the script with `paceline launch`, or set DS_ACCELERATOR={device.type} before it starts",
            )
        if self.context.precision.mode == "fp16":
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
        taken = {id(zero.given) for zero in self._engines}
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
        late = next((optimizer for optimizer in free if any(holds(optimizer, b.model) for b in self._engines)), None)
        if late is not None:
            raise PrepareError(
                f"{type(late).__name__} was prepared after its model",
                "DeepSpeed's engine is built from a model and its optimizer together",
                "Pass both to one call: prepare(model, optimizer)",
            )
        return prepared

    def _optimizer_for(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> Optimizer:
        own = {id(p) for p in model.parameters()}
        matching = [optimizer for optimizer in optimizers if holds(optimizer, model)]
        if len(matching) == 1 and all(id(p) in own for p in parameters_in(matching[0])):
            return matching[0]
        if len(optimizers) == 1 and not matching:
            held = parameters_in(optimizers[0])
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
        check_dtypes(model)
        groups = [list(group["params"]) for group in optimizer.param_groups]
        dtypes = {id(p): self._dtype_of(p) for p in model.parameters()}
        exact = exact_values(model, self._dtype, is_main=self.context.world.is_main)
        known = Known(
            world_size=self.context.group.size,
            micro_batch=self.micro_batch,
            hidden_size=hidden_size_of(model),
            optimizer=optimizer,
            schedule=next((s for s in self.schedules if s.optimizer is optimizer), None),
            on_cpu=self.context.device.type == "cpu",
        )
        self._settings = resolve_settings(self._plugin, self.context.config, known)
        check_compiler(self._settings, optimizer)
        check_disk(self._settings)
        check_monitors(self._settings)
        if self._stage == 3 and self._plugin.transformer_moe_cls_names:
            mark_leaves(model, self._plugin.transformer_moe_cls_names)
        stand_in = optimizer if isinstance(optimizer, DummyOptim) else None
        compile_model(model, self.context.config.dynamo_config)
        told = engine_settings(self._settings, self._stage, self.context.group.size, stand_in=stand_in is not None)
        with as_bytes(model, self._stage, self.context.group):
            engine = self._initialize(
                model=model,
                optimizer=optimizer if stand_in is None else None,
                model_parameters=None if stand_in is None else as_groups(stand_in),
                config=told,
            )
        # The ranks' groups of DeepSpeed's own are there now, which it looks for.
        configure_checkpointing(self._settings)
        zero = ZeroEngine(engine, model, optimizer, partitions_of(engine, self._stage), groups, dtypes)
        engine.set_gradient_accumulation_boundary(True)
        self._watch(zero)
        self._engines.append(zero)
        if stand_in is not None:
            stand_in.hand_over(zero.optimizer)
        restore_exact(zero, exact, self.context)
        prepared: nn.Module = engine
        return prepared

    def _dtype_of(self, parameter: nn.Parameter) -> torch.dtype:
        """The dtype to save a parameter in: its own, but that one built sharded got 16 bits from the engine only."""
        own = parameter.dtype
        return torch.float32 if hasattr(parameter, "ds_id") and own == self._dtype else own

    def _initialize(self, **arguments: Any) -> Any:
        return deepspeed.initialize(**arguments)[0]

    def _watch(self, zero: ZeroEngine) -> None:
        """Note which engines a loss may come from, and hand 16-bit models 16-bit inputs."""
        dtype = self._dtype
        trained = list(zero.model.parameters()) if self._stage > 0 else []
        flags = [p.requires_grad for p in trained]

        def before(_module: nn.Module, inputs: Any, keywords: Any) -> Any:
            if torch.is_grad_enabled():
                zero.pending = True
                now = [p.requires_grad for p in trained]
                if now != flags:
                    _refuse_change(zero, flags, now)
            return None if dtype is None else (cast_inputs(inputs, dtype), cast_inputs(keywords, dtype))

        zero.model.register_forward_pre_hook(before, with_kwargs=True)
        if dtype is None:
            autocast_forward(zero.model, self.context.precision)

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
        engine = self._initialize(model=model, config=self._early)
        self._references.append(engine)
        prepared: nn.Module = engine
        return prepared

    @override
    def unwrap(self, model: nn.Module) -> nn.Module:
        return model.module if isinstance(model, deepspeed.DeepSpeedEngine) else model

    @override
    def parameters_of(self, optimizer: Optimizer) -> list[nn.Parameter]:
        zero = self._find(optimizer)
        return super().parameters_of(optimizer) if zero is None else [p for group in zero.groups for p in group]

    @override
    def add_group(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        if self._find(optimizer) is not None:
            raise PrepareError(
                "add_param_group() was called after the optimizer was prepared",
                "DeepSpeed's engine cuts what it finds in the groups when it is built, and never looks at them again",
                "Put all parameters into the optimizer before prepare(), with lr=0 for what is to learn later",
            )
        super().add_group(optimizer, group)

    @override
    def resolve_placeholder_optimizer(self, optimizer: Optimizer) -> Optimizer:
        zero = self._find(optimizer)
        if zero is None or not isinstance(optimizer, DummyOptim):
            return optimizer
        made: Optimizer = zero.optimizer
        return made

    @override
    def resolve_placeholder_scheduler(self, scheduler: Any) -> Any:
        described = self._settings.get("scheduler")
        if not isinstance(scheduler, DummyScheduler):
            if described is not None:
                raise PrepareError(
                    f"{type(scheduler).__name__} was prepared, and the DeepSpeed configuration has a scheduler section",
                    "One of the two would silently lose",
                    "Prepare a DummyScheduler in its place, or remove the section",
                )
            return scheduler
        zero = self._find(scheduler.optimizer)
        given = scheduler.optimizer if zero is None else zero.given
        scheduler.optimizer = optimizer = self.resolve_placeholder_optimizer(scheduler.optimizer)
        self._scheduled = True
        if scheduler.lr_scheduler_callable is not None:
            return scheduler.lr_scheduler_callable(optimizer)
        if described is None:
            raise PrepareError(
                "A DummyScheduler was prepared",
                "It stands for the scheduler section of the DeepSpeed configuration, and there is none",
                "Add the section, or pass a scheduler of torch.optim.lr_scheduler",
            )
        section = resolve_scheduler(self._settings, scheduler, given)
        self._settings["scheduler"] = section
        return make_scheduler(section, optimizer)

    @override
    def close(self) -> None:
        for zero in self._engines:
            if isinstance(zero.given, DummyOptim):
                zero.given.take_back()
        for engine in (*(zero.engine for zero in self._engines), *self._references):
            let_go(engine)
        self._engines.clear()
        self._references.clear()

    # Models that are built sharded

    @override
    @contextmanager
    def init_module(self) -> Iterator[None]:
        if self._stage != 3:
            yield
            return
        with deepspeed.zero.Init(config_dict_or_path=self._early):
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
        for zero in self._engines:
            for parameter in parameters:
                if zero.partitions.slice_of(parameter) is not None:
                    zero.partitions.value(parameter).values.copy_(piece_of(parameter).values)
            zero.partitions.put_away()

    # What others want to know

    @override
    def describe(self) -> list[str]:
        size = self.context.group.size
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


def _refuse_change(zero: ZeroEngine, before: Sequence[bool], now: Sequence[bool]) -> None:
    """Refuse to train what was frozen, or the other way: the engine has its own list of what it trains."""
    if not any(now):
        # Frozen as a whole, as a discriminator while its generator learns: no step of it is asked for.
        return
    names = [name for name, _ in zero.model.named_parameters()]
    changed = [name for name, was, is_now in zip(names, before, now, strict=True) if was != is_now]
    raise SteppingError(
        f"{named(changed)} of {type(zero.model).__name__} {'was' if len(changed) == 1 else 'were'} frozen or unfrozen "
        "after prepare()",
        "ZeRO cuts what required a gradient when its engine was built: it would not train what is unfrozen later, and "
        "would go on moving what is frozen later",
        "Freeze before prepare(), or give the parameters a group of their own with lr=0 for as long as they rest; "
        "with zero_stage 0, strategy='ddp' or 'fsdp' they may be frozen and unfrozen at any time",
    )
