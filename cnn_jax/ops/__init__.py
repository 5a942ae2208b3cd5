"""The same mathematics as `jax.lax` and `flax.linen`, faster on CPU; nothing else knows about it."""
