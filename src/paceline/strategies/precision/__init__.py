"""Mixed precision: the dtype a run computes in, autocast, and linear layers in fp8."""

from paceline.strategies.precision.policy import DTYPES, PrecisionPolicy, autocast_forward, policy_for, short_dtype

__all__ = ["DTYPES", "PrecisionPolicy", "autocast_forward", "policy_for", "short_dtype"]
