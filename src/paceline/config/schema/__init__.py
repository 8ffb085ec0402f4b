"""The sections of the configuration: frozen models, validated when they are built."""
