"""Searches: `python jobs/tune.py CONFIG key=value`, or the same behind `ray job submit ... --`."""

import sys

from raywgen.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["tune"]
    main()
