"""What a process that answers within milliseconds asks of the interpreter."""

from __future__ import annotations

import gc
import sys

# A thread that wants the interpreter waits so long for one that computes; the default is five milliseconds.
_SWITCH_INTERVAL_S = 0.0005
# A decision makes hundreds of objects, nearly none of them in a cycle; the default looks through the young ones at 700.
_NEW_OBJECTS = 20_000


def begin_to_serve() -> None:
    """To be called once, when everything is loaded.

    What was loaded lives as long as the process: a garbage collector that goes through it again and again stops
    everything for tenths of a second and finds nothing.
    """
    sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL_S))
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, *gc.get_threshold()[1:])
