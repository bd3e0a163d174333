"""One run over a model: its checks, the loop over its layers, what it writes and reports."""
