"""The training and evaluation loops, and what they measure."""
