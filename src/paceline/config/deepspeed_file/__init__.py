"""DeepSpeed's JSON: its keys, its values, and which of them the run decides."""
