"""Weights for a task: `python jobs/adapt.py BUNDLE --support PATH key=value`, or behind `ray job submit ... --`."""

import sys

from raywgen.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["adapt"]
    main()
