"""`python -m raywgen.cli`, the same as `raywgen`."""

from raywgen.cli import main

if __name__ == "__main__":
    main()
