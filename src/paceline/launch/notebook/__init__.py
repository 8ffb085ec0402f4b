"""A function of a notebook or program on every rank, its output where the program shows its own."""
