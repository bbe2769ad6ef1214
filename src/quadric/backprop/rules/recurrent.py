"""Recurrent layers that a kernel fuses: written out step by step, and walked through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quadric.backprop.registry import expansion
from quadric.backprop.saved import wanted, widened


@expansion("MkldnnRnnLayerBackward0", note="LSTM on a CPU; written out step by step, as without the fused kernel")
def lstm_layer(node: Any) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """One direction of one layer of an LSTM: its outputs, last state and last cell, and its inputs."""
    names = ("input", "weight0", "weight1", "weight2", "weight3", "hx_", "cx_")
    saved = [getattr(node, f"_saved_{name}") for name in names]
    tensors = [widened(tensor).detach().requires_grad_(want) for tensor, want in zip(saved, wanted(node), strict=True)]
    x, of_input, of_state, input_bias, state_bias, state, cell = tensors
    steps = x.unbind(0)
    outputs = []
    for step in reversed(steps) if node._saved_reverse else steps:
        gates = step @ of_input.mT + state @ of_state.mT
        if node._saved_has_biases:
            gates = gates + input_bias + state_bias
        enter, forget, new, leave = gates.chunk(4, -1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        state = leave.sigmoid() * cell.tanh()
        outputs.append(state)
    if node._saved_reverse:
        outputs.reverse()
    return (torch.stack(outputs), state, cell), [t if t.requires_grad else None for t in tensors]
