"""DeepSpeed: its engines own backward, step and state."""
