"""Adaptive masking for existing masked autoencoders. README.md in this folder tells how to use it.

    patching.py       patch, unpatch, and the table of hosts
    checks.py         checks of a model before it is patched
    host.py           the base of all hosts
    patched.py        the exchange of a module's class
    submodules.py     mixins of a host's submodules
    mask_use.py       what a host's forward did with the mask
    token_errors.py   the errors of single tokens, for hosts that compute their mean alone
    indexed_mask.py   boolean masks that index without waiting for the device
    old_timm.py       names that research code imports and today's packages lack; import it by name
    huggingface.py    the base of the Hugging Face hosts
    other files       one host each

Hosts are recognised by the names of their classes. No host is imported here.
"""

from adamae_sampler.integrations.host import HostShape, LastStep
from adamae_sampler.integrations.patched import HostInterfaceError
from adamae_sampler.integrations.patching import HOSTS, patch, patched_class, unpatch

__all__ = ["HOSTS", "HostInterfaceError", "HostShape", "LastStep", "patch", "patched_class", "unpatch"]


def __getattr__(name: str) -> object:
    if name == "SeamError":
        raise ImportError(f"{__name__}.SeamError is now called HostInterfaceError.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
