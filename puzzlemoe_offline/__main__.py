"""The `puzzlemoe` command, which `python -m puzzlemoe_offline` is too."""

from puzzlemoe_offline.cli.interrupts import exit_at_once


def main() -> None:
    """Entry point.  Importing what the commands need takes seconds, in which Ctrl-C is no traceback either."""
    exit_at_once()
    from puzzlemoe_offline.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
