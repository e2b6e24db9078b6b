"""``python -m opdctl``: the command line, where the program itself is not on the path."""

from opdctl.cli.app import main

if __name__ == "__main__":
    main()
