"""Masking strategies against each other: data, training, readout, statistics."""
