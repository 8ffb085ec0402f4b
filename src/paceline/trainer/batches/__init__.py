"""From a data set to batches: loaders, samplers, collators."""
