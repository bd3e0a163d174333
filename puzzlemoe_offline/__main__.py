"""`python -m puzzlemoe_offline` is the `puzzlemoe` command."""

from puzzlemoe_offline.entry import main

if __name__ == "__main__":
    main()
