"""`python -m cnn_jax COMMAND --flags`."""

from cnn_jax.main import run

if __name__ == "__main__":
    run()
