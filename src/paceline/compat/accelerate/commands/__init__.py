"""What programs import from Accelerate's commands: the default configuration file, and launching a script."""
