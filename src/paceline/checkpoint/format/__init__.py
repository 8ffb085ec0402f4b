"""The format of a checkpoint: manifest, tensor layout, shards, JSON state and checksums."""
