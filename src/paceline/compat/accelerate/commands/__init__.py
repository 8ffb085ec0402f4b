"""Accelerate's commands, by its names and flags. They stand on paceline's own, which `paceline --help` lists."""
