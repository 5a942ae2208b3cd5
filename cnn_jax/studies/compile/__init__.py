"""Programs of the steps, compiled for devices that this machine need not have."""
