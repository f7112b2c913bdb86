"""Numbers that every implementation must reproduce: of TensorFlow's own test, and such as tell variants apart."""

import numpy as np

from agnmpi import adam, sgd
from agnmpi.core import rules

TOLERANCE = 1e-6

# name: rule, local optimizer, center optimizer, gradients, start, λ, {steps: local after}, {commits: center after}
ONE_WORKER = {
    "tensorflow, lambda 4": (
        rules.agn(), adam(0.1, 0.0, 0.0), None, [-1] * 8, (0.0, 0.5), 4,
        {1: (0.1, 0.6), 3: (0.3, 0.8), 4: (0.1, 0.6), 8: (0.2, 0.7)},
        {1: (0.0, 0.5), 3: (0.0, 0.5), 4: (0.1, 0.6), 8: (0.2, 0.7)},
    ),
    "sgd displacement": (
        rules.agn(), sgd(0.1), None, [-1, -2, -3, -4] * 2, (0.0,), 4,
        {1: (0.1,), 2: (0.3,), 3: (0.6,)}, {4: (0.25,), 8: (0.50,)},
    ),
    "sgd gradient": (
        rules.agn("gradient"), sgd(0.1), sgd(0.1), [-1, -2, -3, -4] * 2, (0.0,), 4,
        {1: (0.1,), 2: (0.3,), 3: (0.6,)}, {4: (0.25,), 8: (0.50,)},
    ),
    "adam displacement": (
        rules.agn(), adam(0.1), None, [-1, -2, -3, -4] * 2, (0.0,), 4,
        {1: (0.1,), 2: (0.19651816,), 3: (0.29231827,)}, {4: (0.09708982,), 8: (0.18943841,)},
    ),
    "adam gradient": (
        rules.agn("gradient"), adam(0.1), adam(0.1), [-1, -2, -3, -4] * 2, (0.0,), 4,
        {1: (0.1,), 2: (0.19651816,), 3: (0.29231827,)}, {4: (0.09999999,), 8: (0.19999998,)},
    ),
    "easgd, lambda 2": (
        rules.aeasgd(1.0), sgd(1.0), None, [-1] * 4, (0.0, 1.0), 2,
        {1: (1, 2), 2: (0, 1), 3: (1, 2), 4: (2, 3)}, {1: (0, 1), 2: (2, 3), 4: (2, 3)},
    ),
}  # fmt: skip

# Two workers, λ = 1, one after the other: rule, optimizer, start, [(worker, its parameters, the center) after]
TWO_WORKERS = {
    "tensorflow, lambda 1": (
        rules.agn(), adam(0.1, 0.0, 0.0), (0.0, 0.5),
        [(0, (0.1, 0.6), (0.1, 0.6)), (1, (0.2, 0.7), (0.2, 0.7)), (0, (0.3, 0.8), (0.3, 0.8)),
         (1, (0.4, 0.9), (0.4, 0.9)), (0, (0.5, 1.0), (0.5, 1.0)), (1, (0.6, 1.1), (0.6, 1.1))],
    ),
    "easgd, alpha 0.5": (
        rules.aeasgd(0.5), sgd(1.0), (0.0, 1.0),
        [(0, (0.5, 1.5), (0.5, 1.5)), (1, (0.75, 1.75), (0.75, 1.75))],
    ),
}  # fmt: skip


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)
