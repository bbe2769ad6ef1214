"""The rules of the library, one file for each family of operations; importing them registers them."""

from quadric.backprop.rules import (
    attention,
    elementwise,
    inverses,
    losses,
    movement,
    norms,
    products,
    recurrent,
    reductions,
    softmax,
)

__all__ = [
    "attention",
    "elementwise",
    "inverses",
    "losses",
    "movement",
    "norms",
    "products",
    "recurrent",
    "reductions",
    "softmax",
]
