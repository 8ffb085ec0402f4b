"""What scripts pass to the Accelerator: enumerations, handlers and plugins, as mutable dataclasses.

`None` means "not set": the value comes from the environment, or from a default. These modules know no other module of
the package, so that `state` and `utils` can both use them; `utils.dataclasses` exports their names.
"""
