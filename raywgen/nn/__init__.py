"""Modules that generators share: transformer, quantiser, condition encoders."""
