"""Evaluations of runs, checkpoints and changed images, measured beyond accuracy."""
