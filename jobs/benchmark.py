"""Runs a benchmark: `python jobs/benchmark.py NAME [key=value ...]`; the last line is one JSON object.

`python jobs/benchmark.py NAME --help` lists the settings.
"""

from raywgen.benchmarks.run import main

if __name__ == "__main__":
    main()
