"""raywgen: train generators of neural-network weights on a Ray cluster, and put them to use."""
