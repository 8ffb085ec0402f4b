"""The configuration's sections: frozen models, validated when they are built."""
