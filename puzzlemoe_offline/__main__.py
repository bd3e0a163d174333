"""`python -m puzzlemoe_offline` is the `puzzlemoe` command."""

from puzzlemoe_offline.cli.main import main

main()
