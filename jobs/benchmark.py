"""Runs a benchmark: `python jobs/benchmark.py NAME [key=value ...]`; the last line is one JSON object."""

from raywgen.benchmarks.run import main

if __name__ == "__main__":
    main()
