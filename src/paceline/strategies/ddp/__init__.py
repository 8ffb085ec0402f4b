"""DDP: every rank holds the whole model, and gradients are averaged over the ranks."""
