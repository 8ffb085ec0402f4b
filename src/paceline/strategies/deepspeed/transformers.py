"""Makes `from_pretrained` and `from_config` of transformers build sharded models under ZeRO stage 3.

transformers keeps a weak reference to one configuration object, which says whether stage 3 is on. The strategy owns
that object, so sharding ends with the strategy.
"""

from __future__ import annotations

import importlib.util
from typing import Any

__all__ = ["HfDeepSpeedConfig", "announce"]


class HfDeepSpeedConfig:
    """A DeepSpeed configuration with the methods that transformers and its users call.

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
        """The section with the last key of a dotted path (None if there is none), and that key."""
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
        """Whether optimizer states or parameters are offloaded."""
        devices = (self.get_value(f"zero_optimization.offload_{part}.device") for part in ("optimizer", "param"))
        return any(device in ("cpu", "nvme") for device in devices)

    def del_config_sub_tree(self, path: str, must_exist: bool = False) -> None:
        """Remove the value or section at a dotted path.

        Raises:
            ValueError: There is none, and `must_exist` is true.
        """
        node, key = self.find_config_node(path)
        if node is not None and key in node:
            del node[key]
        elif must_exist:
            raise ValueError(f"the configuration has no {path}")


def announce(config: dict[str, Any]) -> HfDeepSpeedConfig | None:
    """Have transformers build sharded models for as long as the result lives; None if it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers.integrations.deepspeed import set_hf_deepspeed_config

    announced = HfDeepSpeedConfig(config)
    set_hf_deepspeed_config(announced)  # type: ignore[no-untyped-call]
    return announced
