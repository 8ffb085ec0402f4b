"""Moving tensors between devices, host memory and checkpoint files."""
