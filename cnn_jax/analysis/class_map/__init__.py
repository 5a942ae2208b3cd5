"""Class maps of images larger than those of the training."""
