"""Models as files: reading them, tracing where they come from, and writing them completely or not at all."""
