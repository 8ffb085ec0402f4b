"""Let `from_pretrained` and `from_config` of transformers build models sharded, under ZeRO stage 3.

transformers asks one object, which it holds weakly, whether stage 3 is on and with which configuration. It is told
by its own function; the object dies with the strategy that made it, and with it the sharding.
"""

from __future__ import annotations

import importlib.util
from typing import Any

__all__ = ["HfDeepSpeedConfig", "announce"]


class HfDeepSpeedConfig:
    """A DeepSpeed configuration with the questions that transformers and its users ask of one.

    Attributes:
        config: The configuration as a dictionary.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.get_value("zero_optimization.stage", 0))

    def find_config_node(self, path: str) -> tuple[dict[str, Any] | None, str]:
        """The section that holds the last key of a dotted path (None where there is none), and that key."""
        *sections, key = path.split(".")
        node: Any = self.config
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        return (node if isinstance(node, dict) else None), key

    def get_value(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path."""
        node, key = self.find_config_node(path)
        return default if node is None else node.get(key, default)

    def is_true(self, path: str) -> bool:
        """Whether the value is set and true."""
        return bool(self.get_value(path))

    def is_false(self, path: str) -> bool:
        """Whether the value is set and false."""
        value = self.get_value(path)
        return value is not None and not value

    def is_zero2(self) -> bool:
        """Whether the stage is 2."""
        return self.stage == 2

    def is_zero3(self) -> bool:
        """Whether the stage is 3."""
        return self.stage == 3

    def is_offload(self) -> bool:
        """Whether optimizer states or parameters are kept off the device."""
        devices = (self.get_value(f"zero_optimization.offload_{part}.device") for part in ("optimizer", "param"))
        return any(device in ("cpu", "nvme") for device in devices)

    def del_config_sub_tree(self, path: str, must_exist: bool = False) -> None:
        """Remove what is at a dotted path.

        Raises:
            ValueError: There is nothing, and `must_exist` was given.
        """
        node, key = self.find_config_node(path)
        if node is not None and key in node:
            del node[key]
        elif must_exist:
            raise ValueError(f"the configuration has no {path}")


def announce(config: dict[str, Any]) -> HfDeepSpeedConfig | None:
    """Tell transformers to build models sharded for as long as the returned object lives; None without it."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers.integrations.deepspeed import set_hf_deepspeed_config

    told = HfDeepSpeedConfig(config)
    set_hf_deepspeed_config(told)  # type: ignore[no-untyped-call]
    return told
