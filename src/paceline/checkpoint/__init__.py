"""Weights on disk. Whole training states come with the checkpoint system."""

from paceline.checkpoint.weights import parse_size, save_weights

__all__ = ["parse_size", "save_weights"]
