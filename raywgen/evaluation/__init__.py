"""Judging generated networks: the accuracy ladder, novelty, and the report."""
