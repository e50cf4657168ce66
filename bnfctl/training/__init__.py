"""Training: batches, the loop, references, ranks, checkpoints."""
