"""Sources of the configuration: flags, environment, files; each value keeps its place."""
