"""The package's ops at one size each, beside the official formulation of the same."""
