"""DeepSpeed's own JSON: its keys, its values, and the values that the run sets."""
