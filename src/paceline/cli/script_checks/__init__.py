"""Checks of a user's script: `paceline parity` and `paceline verify-resume`."""
