"""What is known to break policies silently, looked for in a dataset before anything is trained on it."""
