"""Training: recipes, the loop, metrics, checkpoints and resumption."""
