"""Read and write Hugging Face checkpoints a block at a time."""
