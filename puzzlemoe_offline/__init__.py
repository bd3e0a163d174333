"""The offline tool: calibrate, merge and pack a Mixture-of-Experts checkpoint.  Command line: `puzzlemoe`."""
