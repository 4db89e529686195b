"""Threads of torch that sleep while they wait, in place of spinning. Import this file before torch.

OpenMP's threads spin on their core until the others arrive. Beside another program, or beside a reader process, that
core is then missing. torch reads the setting when it is loaded. A value that the user has set stays.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
