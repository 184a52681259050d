"""Runs the command line as `python -m raywgen`, the same as `raywgen`."""

from raywgen.cli import main

if __name__ == "__main__":
    main()
