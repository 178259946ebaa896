"""Reading, recognizing and writing checkpoint files."""
