"""What programs import as `accelerate`: its names, on paceline. Names are resolved on first use."""

from __future__ import annotations

from paceline.environment.lazy_names import lazy_attributes

# The release whose names, signatures and meanings these are.
__version__ = "1.15.0"

_NAMES = {
    "accelerator": "Accelerator",
    "big_modeling": """
        cpu_offload cpu_offload_with_hook disk_offload dispatch_model init_empty_weights init_on_device
        load_checkpoint_and_dispatch
    """,
    "checkpointing": "",
    "commands": "",
    "data_loader": "skip_first_batches",
    "hooks": "",
    "inference": "prepare_pippy",
    "launchers": "debug_launcher notebook_launcher",
    "local_sgd": "",
    "logging": "",
    "memory_utils": "",
    "optimizer": "",
    "parallelism_config": "ParallelismConfig",
    "scheduler": "",
    "state": "PartialState",
    "tracking": "",
    "utils": """
        AutocastKwargs DataLoaderConfiguration DDPCommunicationHookType DeepSpeedPlugin DistributedDataParallelKwargs
        DistributedType FullyShardedDataParallelPlugin GradScalerKwargs InitProcessGroupKwargs ProfileKwargs
        find_executable_batch_size infer_auto_device_map is_rich_available load_checkpoint_in_model
        synchronize_rng_states
    """,
}

__getattr__, __all__ = lazy_attributes(__name__, _NAMES)
__all__ += ["__version__"]
