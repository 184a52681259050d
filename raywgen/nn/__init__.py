"""Modules that generators share: transformer, quantisers, batch statistics, condition encoders."""
