"""What a checkpoint folder holds: the manifest, tensor layout, shards, checksums."""
