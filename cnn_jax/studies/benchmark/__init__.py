"""./launch.sh benchmark: the speed of a training step, alone and beside PyTorch and Keras."""
