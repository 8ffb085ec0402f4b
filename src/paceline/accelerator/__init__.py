"""The facade: `Accelerator`, and the parts that it is composed of."""
