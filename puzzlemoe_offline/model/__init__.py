"""Reading models: where they are, what they hold, running them layer by layer."""
