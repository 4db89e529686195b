"""Pictures and animations of what a masked autoencoder sees and predicts.

`overview` and `animation` take a model and its input, or the tensors of a step. This module needs matplotlib, so the
package does not import it: `from adamae_sampler import visualize`.
"""

import importlib.util

if importlib.util.find_spec("matplotlib") is None:
    raise ImportError("adamae_sampler.visualize needs matplotlib: pip install 'adamae_sampler[visualize]'.")

from adamae_sampler.visualize.files import save_animation
from adamae_sampler.visualize.pictures import animation, mask_overview, overview, to_pixels
from adamae_sampler.visualize.steps import Statistics, predicted_video

__all__ = ["Statistics", "animation", "mask_overview", "overview", "predicted_video", "save_animation", "to_pixels"]
