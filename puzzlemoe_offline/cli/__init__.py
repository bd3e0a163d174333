"""The `puzzlemoe` command: one file a command."""
