"""``python -m opdctl``: the command line, where the program itself is not on the path."""

from opdctl.process.import_path import close_working_directory

if __name__ == "__main__":
    close_working_directory()  # before anything is imported that a file there could stand for

    from opdctl.cli.app import main

    main()
