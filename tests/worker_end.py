"""How a script that a test runs as one of several processes ends."""

import os
import sys

from flexrec.policy.distributed import leave


def end():
    """Leave the other processes, and this one without what Python does at an exit.

    A thread of gloo's that lets go of a tensor when Python has begun to end is ended by Python, in a C++ destructor,
    which aborts the process ("terminate called without an active exception"): now and then, on a busy machine, and
    taken for a fault of what is tested.
    """
    leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
