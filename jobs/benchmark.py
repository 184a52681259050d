"""Runs a benchmark: `python jobs/benchmark.py NAME [key=value ...]`; the last line is one JSON object.

`python jobs/benchmark.py NAME --help` lists the settings; `record=docs/results` also keeps the result in a file.
"""

from raywgen.benchmarks.run import main

if __name__ == "__main__":
    main()
