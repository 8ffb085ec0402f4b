"""Plain training scripts on Accelerate's names, each with one feature. They give the same numbers through the switch."""
