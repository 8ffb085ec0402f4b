"""Launching a function from a notebook or program, with the ranks' output shown where the program shows its own."""
