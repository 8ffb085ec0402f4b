"""Mixed precision: the dtype a run computes in, autocast, and linear layers in fp8."""

from paceline.strategies.precision.policy import PrecisionPolicy, autocast_forward, policy_for

__all__ = ["PrecisionPolicy", "autocast_forward", "policy_for"]
