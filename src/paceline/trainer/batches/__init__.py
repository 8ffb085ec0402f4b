"""Loaders, samplers and collators: from a data set to batches."""
