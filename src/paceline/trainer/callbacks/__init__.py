"""Callbacks: code that runs at the events of a training."""
