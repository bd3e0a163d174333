"""Text, and what the experts saw of it."""
