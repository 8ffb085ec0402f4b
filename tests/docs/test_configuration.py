"""The reference page of the settings is what the schema says."""

from __future__ import annotations

import os
from pathlib import Path

from paceline.config.reference import reference_page
from paceline.config.schema.names import all_settings

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
RENEW = "RENEW_SNAPSHOTS"


def test_the_page_is_what_the_schema_says() -> None:
    text = reference_page()
    if os.environ.get(RENEW):
        PAGE.write_text(text, encoding="utf-8")
    hint = f"the settings changed: {RENEW}=1 python -m pytest tests/docs/test_configuration.py"
    assert PAGE.exists(), hint
    assert PAGE.read_text(encoding="utf-8") == text, hint


def test_the_page_names_every_key_flag_and_variable() -> None:
    text = reference_page()
    for setting in all_settings().values():
        assert f"`{setting.key}`" in text
        if setting.has_flag and not setting.description.startswith("Version 1"):
            assert f"`--{setting.flag}`" in text
            assert f"`PACELINE_{setting.flag.upper()}`" in text
