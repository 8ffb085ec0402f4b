"""What `paceline test` runs on every rank."""
