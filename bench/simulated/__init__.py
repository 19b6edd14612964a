"""Plans and metadata of checkpoints far larger than this machine, made without any tensor data."""
