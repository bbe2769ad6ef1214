"""Counts in place of times: kernels launched, passes over large memory, bytes kept."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FREE = {"aten::empty.memory_format", "aten::empty_like", "aten::new_empty", "aten::_unsafe_view", "aten::lift_fresh"}


class Count(TorchDispatchMode):
    """Operations that launch a kernel; of those, the ones that read or write at least ``large`` numbers at once."""

    def __init__(self, large=1 << 60):
        super().__init__()
        self.large, self.launches, self.passes = large, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name()
        if not func.is_view and name not in FREE:
            self.launches.append(name)
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            if any(t.numel() >= self.large for t in tensors):
                self.passes.append(name)
        return func(*args, **kwargs)


def count(function, large=1 << 60):
    with Count(large) as counted:
        function()
    return counted


def bytes_kept(optimizer):
    """All memory an optimizer holds between steps, each storage once."""
    storages = {}
    for blocks in optimizer._blocks.values():
        for block in blocks:
            for tensor in (block.flat, *block.buffers.values(), *block.curvature.buffers(), *vars(block).values()):
                if isinstance(tensor, torch.Tensor):
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())
