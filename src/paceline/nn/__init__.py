"""Layers and losses for models, which need no Accelerator."""

from paceline.nn.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]
