"""The paper's experiments as a grid of cached stages (docs/reproduce.md).

``reproduce`` is the command, ``grid`` says which stages there are, ``stage_work`` what each does, ``stages`` caches
and carries them out, ``training`` runs one training, ``plan`` and ``step_time`` estimate what is ahead, ``ablations``
sweep one setting.
"""

from .grid import Settings
from .reproduce import reproduce

__all__ = ["Settings", "reproduce"]
