"""Training steps: the package's, the official formulation's, the hosts' and the classifier's."""
