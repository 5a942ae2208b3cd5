"""Training: the step, the loop, checkpoints, the workdir."""
