"""Adaptive masking for the masked autoencoders that people already have. A reading map:

    patching.py       patch, unpatch, and the table of hosts
    checks.py         what a model must be like to be patched
    host.py           what all patched hosts share
    indexed_mask.py   boolean masks that index without waiting for the device
    huggingface.py    what the Hugging Face hosts share
    the others        one host each

Hosts are recognised by the names of their classes, and none is imported here.
"""

from adamae_sampler.integrations.host import HostShape, LastStep, SeamError
from adamae_sampler.integrations.patching import HOSTS, patch, patched_class, unpatch

__all__ = ["HOSTS", "HostShape", "LastStep", "SeamError", "patch", "patched_class", "unpatch"]
