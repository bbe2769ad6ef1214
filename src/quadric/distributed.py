"""What several processes that train one model share: the only room that knows ``torch.distributed``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["alone", "average_"]


def alone() -> bool:
    """Whether this is the only process."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their averages over all processes, in one message for each type and device.

    ``DistributedDataParallel`` averages gradients in this way. Every process must call it with tensors of the same
    shapes, in the same order.

    Args:
        tensors: on one device or several.
    """
    buckets: dict[tuple, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        buckets[tensor.device, tensor.dtype].append(tensor)
    for bucket in buckets.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))
