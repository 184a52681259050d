"""One file per benchmark; `jobs/benchmark.py` only calls them."""
