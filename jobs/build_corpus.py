"""Builds a corpus: `python jobs/build_corpus.py OUT --from SOURCE`, or the same behind `ray job submit ... --`."""

import sys

from raywgen.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["corpus", "build"]
    main()
