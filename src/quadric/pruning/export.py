"""What a pruned model is saved as: zeros in dense tensors, compressed rows, or the 2:4 matrices of newer GPUs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quadric.pruning.masks import Masks

__all__ = ["Layout", "export"]

Layout = Literal["dense", "csr", "2:4"]


@torch.no_grad()
def export(model: nn.Module, masks: Mapping[str, Tensor], layout: Layout = "dense") -> dict[str, Any]:
    """The ``state_dict`` of a model as copies, with its masked weights in another layout.

    ======== ====================================================================================================
    "dense"  as they are, removed weights 0.0; ``model.load_state_dict`` takes it, and so does safetensors
    "csr"    ``torch.sparse_csr`` of the view ``(out, everything else)``: what is kept, even where it is 0.0, with
             indices of four bytes where they suffice. ``state[name].to_dense().view(shape)`` is the way back, with
             the shape of the model's parameter
    "2:4"    ``torch.sparse.to_sparse_semi_structured`` of masked matrices, for CUDA devices of capability 8.0 or
             more: ``linear.weight = nn.Parameter(state["linear.weight"])`` multiplies by half of the numbers.
             Torch has no such convolutions, whose weights stay dense with their zeros
    ======== ====================================================================================================

    Unmasked tensors, and masked ones with a single axis, stay dense. ``torch.save`` takes every layout. The masks
    themselves go into a file of their own, and back to :func:`quadric.hold_masks`:
    ``safetensors.torch.save_file(masks, "masks.safetensors")`` and ``safetensors.torch.load_file``.

    Cost: one copy of the model.

    Args:
        model: Of whose parameters the masks are.
        masks: Boolean tensors by the names of parameters, True where a weight is kept.
        layout: "dense", "csr" or "2:4".

    Returns:
        Tensors by the keys of ``model.state_dict()``; a tied weight is masked under all its names.

    Raises:
        ValueError: if a mask fits no parameter, the layout is unknown, or for "2:4" a mask keeps more than two of four
            weights in a row, or the device, type or shape has no kernel.

    Example:
        Of four weights three are kept, in rows that begin at 0 and 1.

        >>> layer = nn.Linear(2, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> state = export(layer, {"weight": torch.tensor([[True, False], [True, True]])}, "csr")
        >>> state["weight"].crow_indices().tolist(), state["weight"].values().tolist()
        ([0, 1, 3], [1.0, 3.0, 4.0])
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}: choose one of {', '.join(map(repr, LAYOUTS))}")
    kept: dict[int, Tensor] = {}
    known = Masks.of(model, masks)
    for name, mask in known.items():
        at = id(known.parameter(name))
        kept[at] = kept[at] & mask if at in kept else mask
    by_name = {name: kept.get(id(p)) for name, p in model.named_parameters(remove_duplicate=False)}
    state = {}
    for name, value in model.state_dict().items():
        mask = by_name.get(name)
        if mask is not None:
            state[name] = LAYOUTS[layout](name, value, mask.to(value.device))
        else:
            state[name] = value.clone() if isinstance(value, Tensor) else value
    return state


def dense(name: str, weight: Tensor, mask: Tensor) -> Tensor:
    """The weight with zeros, whatever stood there."""
    return weight.masked_fill(~mask, 0)


def compressed_rows(name: str, weight: Tensor, mask: Tensor) -> Tensor:
    """The kept weights of each row, one after the other."""
    if weight.ndim < 2:
        return dense(name, weight, mask)
    weight, mask = weight.flatten(1), mask.flatten(1)
    index = torch.int32 if weight.numel() < 2**31 else torch.int64
    starts = torch.zeros(len(weight) + 1, dtype=index, device=weight.device)
    starts[1:] = mask.sum(1).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # whoever asks for it knows
        return torch.sparse_csr_tensor(
            starts, mask.nonzero()[:, 1].to(index), weight[mask], weight.shape, check_invariants=True
        )


def semi_structured(name: str, weight: Tensor, mask: Tensor) -> Tensor:
    """Two of four weights of a matrix, and which they are."""
    if weight.ndim != 2:
        return dense(name, weight, mask)
    rows, columns = mask.shape
    many = mask.new_zeros(0) if columns % 4 else (mask.view(rows, -1, 4).sum(-1) > 2).nonzero()
    if columns % 4 or len(many):
        first = f"row {many[0, 0]} from column {4 * many[0, 1]}" if len(many) else f"{columns} columns, not fours"
        raise ValueError(
            f"{name} does not have the pattern 2:4 ({first}): prune with pattern='2:4', or leave its mask out"
        )
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 0):
        raise ValueError(
            f"2:4 matrices need a CUDA device of capability 8.0 or more, and {name} is on {weight.device}: move the "
            "model to one, or choose layout='dense', which keeps the pattern"
        )
    try:
        return torch.sparse.to_sparse_semi_structured(dense(name, weight, mask).contiguous())
    except RuntimeError as error:
        raise ValueError(
            f"torch has no 2:4 kernel for {name}, {tuple(weight.shape)} in {weight.dtype} ({error}): leave its mask "
            "out, or convert the model to float16 or bfloat16"
        ) from error


LAYOUTS: dict[Layout, Callable[[str, Tensor, Tensor], Tensor]] = {
    "dense": dense,
    "csr": compressed_rows,
    "2:4": semi_structured,
}
