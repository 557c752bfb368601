"""Models: their structure, and reading and writing their checkpoints a block at a time."""
