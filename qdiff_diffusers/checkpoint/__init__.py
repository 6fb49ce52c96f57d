"""Models as files: reading what a folder or file holds, where it comes from, and writing another one whole or not at all."""
