"""The command's entry: `thinsight`, and `python -m thinsight` where that is not on the path."""

from thinsight.interrupts import end_on_interrupt


def main() -> None:
    """Run the command; Ctrl-C is quiet from the first import on."""
    end_on_interrupt()
    from thinsight.cli import main as command

    command()


if __name__ == "__main__":
    main()
