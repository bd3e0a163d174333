"""`python -m puzzlemoe_offline` is the `puzzlemoe` command."""

from puzzlemoe_offline.entry import main

main()
