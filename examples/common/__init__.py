"""What the example scripts share: recipe, data, transforms, logging, training state."""
