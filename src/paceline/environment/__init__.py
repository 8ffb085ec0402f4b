"""The process's environment: rank and world size, device, host, process group, logging."""
