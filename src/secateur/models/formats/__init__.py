"""What a linear looks like in the files."""
