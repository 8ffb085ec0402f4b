"""The state of a run: what it consists of, when and where it is saved, and how it is loaded."""
