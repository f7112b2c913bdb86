"""What survives: checkpoints, restoring, and going on without a lost center."""
