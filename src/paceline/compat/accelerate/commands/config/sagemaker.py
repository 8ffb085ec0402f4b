"""Accelerate's questions about SageMaker, which paceline does not launch on."""

from __future__ import annotations

from typing import Any

from paceline.compat.accelerate.settings.errors import unsupported

__all__ = ["get_sagemaker_input"]


@unsupported("paceline does not start jobs on SageMaker", "Start `paceline launch` in the job's own entry point")
def get_sagemaker_input() -> Any:
    """Ask about a job on SageMaker: not supported."""
