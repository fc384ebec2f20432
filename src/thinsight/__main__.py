"""`python -m thinsight`: the command, where it is not on the path."""

from thinsight.cli import main

if __name__ == "__main__":
    main()
