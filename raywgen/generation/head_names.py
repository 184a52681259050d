"""Names of the heads that a classifier is chosen from."""

from typing import Literal

HeadName = Literal["best", "written", "means", "ridge", "blocks", "own-means", "own-blocks"]
