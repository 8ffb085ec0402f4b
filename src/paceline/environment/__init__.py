"""What this process finds around itself: ranks, devices, the process group, the log."""
