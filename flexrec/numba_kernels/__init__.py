"""How, on a CPU: parallel numba. Modules are named as those of ``flexrec.ops`` whose work they do.

They are loaded by ``flexrec.ops.library.kernels`` when they are first used: numba takes a second to import.

Every kernel says what its arithmetic may do (``fastmath=``): numba gives a function that does not say it the fast math
of the function that happens to call it first, and keeps that in its cache.
"""

# Stands for a logit of -inf. Being finite it needs no special case: its probability underflows to exactly 0, 0 * FLOOR
# is 0 and not NaN, and where nothing else remains the softmax over equal FLOORs is uniform.
FLOOR = -1e20
IMPOSSIBLE = FLOOR / 2  # a logit or log-probability below this is that of an impossible candidate


class OutOfRange(ValueError):
    """A kernel has read a value that it computes nothing for. Whoever called it knows what the value is called."""
