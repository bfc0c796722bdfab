"""Checks of Python arguments. Every message names the argument, what was expected and what came."""

import math
from numbers import Real

from torch import Tensor


def described(value):
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def check_whole(at_least=1, **values):
    """int and nothing else: neither True nor 2.0."""
    for name, value in values.items():
        if type(value) is not int or value < at_least:
            raise ValueError(f"{name}: expected a whole number, at least {at_least}, got {value!r}")


def check_finite(**values):
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
