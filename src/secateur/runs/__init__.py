"""One life of a run: its folder, its files, its progress, what it says when it fails."""
