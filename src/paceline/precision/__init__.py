"""Mixed precision: autocast, and the loss scaling that fp16 needs."""

from paceline.precision.policy import PrecisionPolicy, autocast_forward, policy_for
from paceline.precision.scaler import LossScaler

__all__ = ["LossScaler", "PrecisionPolicy", "autocast_forward", "policy_for"]
