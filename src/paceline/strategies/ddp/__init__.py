"""DDP: every rank has the whole model, and gradients are averaged over the ranks."""
