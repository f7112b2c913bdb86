"""The arithmetic of the optimizers on one block of a vector on the host; `device_kernels` has the same for devices."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from .backend import Array

# A host kernel moves one block x against g, in place, with the block's slots, two scratch arrays and the scalars of
# the step: 0-d arrays of x's dtype, for which NumPy's calls cost less than for Python's numbers.
HostKernel: TypeAlias = Callable[..., None]


def _sgd(x: Array, g: Array, _slots: Sequence[Array], s: Array, _r: Array, eta: Array) -> None:
    x -= np.multiply(g, eta, out=s)


def _momentum(x: Array, g: Array, slots: Sequence[Array], s: Array, _r: Array, eta: Array, beta: Array) -> None:
    (m,) = slots
    m *= beta
    m += g
    x -= np.multiply(m, eta, out=s)


def _nesterov(x: Array, g: Array, slots: Sequence[Array], s: Array, _r: Array, eta: Array, beta: Array) -> None:
    (m,) = slots
    m *= beta
    m += g
    np.multiply(m, beta, out=s)
    s += g
    s *= eta
    x -= s


def _adagrad(x: Array, g: Array, slots: Sequence[Array], s: Array, r: Array, eta: Array, epsilon: Array) -> None:
    (v,) = slots
    v += np.multiply(g, g, out=s)
    np.sqrt(v, out=s)
    s += epsilon
    np.multiply(g, eta, out=r)
    x -= np.divide(r, s, out=s)


def _rmsprop(
    x: Array, g: Array, slots: Sequence[Array], s: Array, r: Array, eta: Array, rho: Array, fresh: Array, epsilon: Array
) -> None:
    (v,) = slots
    np.multiply(g, g, out=s)
    s *= fresh
    v *= rho
    v += s
    np.sqrt(v, out=s)
    s += epsilon
    np.multiply(g, eta, out=r)
    x -= np.divide(r, s, out=s)


def _adam(
    x: Array,
    g: Array,
    slots: Sequence[Array],
    s: Array,
    _r: Array,
    beta1: Array,
    fresh1: Array,
    beta2: Array,
    fresh2: Array,
    epsilon: Array,
    eta: Array,
) -> None:
    m, v = slots
    # The order that was fastest of several: g is used twice while it is in cache, and few calls take three vectors.
    np.multiply(g, fresh2, out=s)
    s *= g
    v *= beta2
    v += s
    np.multiply(g, fresh1, out=s)
    m *= beta1
    m += s
    np.sqrt(v, out=s)
    s += epsilon
    np.divide(m, s, out=s)
    s *= eta
    x -= s


HOST: dict[str, HostKernel] = {
    "sgd": _sgd,
    "momentum": _momentum,
    "nesterov": _nesterov,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "adam": _adam,
}
