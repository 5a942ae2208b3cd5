"""Images and labels: from TensorFlow Datasets to batches."""
