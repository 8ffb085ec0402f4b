"""Plain training scripts on Accelerate's names, each with one feature. The switch changes no number."""
