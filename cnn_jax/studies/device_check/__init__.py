"""`benchmark --device_check`: what only an accelerator can show."""
