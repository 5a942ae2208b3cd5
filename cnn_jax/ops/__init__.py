"""Operations of `jax.lax` and `flax.linen` that are faster on CPU, with the same results."""
