"""DeepSpeed's own configuration, with access by dotted keys. transformers derives classes from it."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any

from paceline.compat.accelerate.settings.errors import InvalidValueError

__all__ = ["HfDeepSpeedConfig"]


class HfDeepSpeedConfig:
    """DeepSpeed's configuration.

    Args:
        config_file_or_dict: A dict, which is copied; the path of a JSON file; or JSON, plain or in base64.

    Attributes:
        config: The configuration.
    """

    def __init__(self, config_file_or_dict: Any) -> None:
        self.config: dict[str, Any] = _read(config_file_or_dict)
        self.set_stage_and_offload()

    def set_stage_and_offload(self) -> None:
        """Read the ZeRO stage and the offload devices again, after a change of `config`."""
        self._stage = self.get_value("zero_optimization.stage", -1)
        devices = {self.get_value(f"zero_optimization.offload_{part}.device") for part in ("optimizer", "param")}
        self._offload = self._stage in (2, 3) and not devices.isdisjoint(("cpu", "nvme"))

    def find_config_node(self, ds_key_long: str) -> tuple[dict[str, Any] | None, str]:
        """Return the section that a dotted key lies in, or None, and the last part of the key."""
        *sections, key = ds_key_long.split(".")
        node: dict[str, Any] | None = self.config
        for section in sections:
            node = node.get(section) if node is not None else None
        return node, key

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """Return the value of a dotted key, or the default."""
        node, key = self.find_config_node(ds_key_long)
        return default if node is None else node.get(key, default)

    def del_config_sub_tree(self, ds_key_long: str, must_exist: bool = False) -> None:
        """Delete a dotted key with all that lies below it.

        Raises:
            InvalidValueError: It does not exist, and must.
        """
        node, key = self.find_config_node(ds_key_long)
        if node is not None and node.get(key) is not None:
            del node[key]
        elif must_exist:
            raise InvalidValueError(
                f"{ds_key_long} is to be deleted", f"The configuration does not have it: {self.config}", "Check the key"
            )

    def is_true(self, ds_key_long: str) -> bool:
        """Whether a dotted key is set, and true."""
        return bool(self.get_value(ds_key_long))

    def is_false(self, ds_key_long: str) -> bool:
        """Whether a dotted key is set, and false."""
        value = self.get_value(ds_key_long)
        return value is not None and not value

    def is_zero2(self) -> bool:
        """Whether ZeRO shards gradients and optimizer state."""
        return bool(self._stage == 2)

    def is_zero3(self) -> bool:
        """Whether ZeRO shards parameters too."""
        return bool(self._stage == 3)

    def is_offload(self) -> bool:
        """Whether optimizer state or parameters are kept off the device."""
        return self._offload


def _read(given: Any) -> dict[str, Any]:
    if isinstance(given, dict):
        return copy.deepcopy(given)
    try:
        config = json.loads(_text_of(str(given)))
    except ValueError as error:
        raise _not_a_configuration(given) from error
    if not isinstance(config, dict):
        raise _not_a_configuration(given)
    return config


def _text_of(given: str) -> str:
    text = given.lstrip()
    if text.startswith("{"):
        return text
    if Path(given).exists():
        return Path(given).read_text(encoding="utf-8")
    return base64.urlsafe_b64decode(given).decode("utf-8")


def _not_a_configuration(given: Any) -> InvalidValueError:
    return InvalidValueError(
        f"DeepSpeed's configuration is {given!r}",
        "It is no dict, no existing JSON file, and no JSON",
        "Check the path",
    )
