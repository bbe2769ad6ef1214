"""Batch normalisation after pruning: the statistics of activations have moved, and are gathered afresh."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from quadric.pruning.gradients import LossFunction

__all__ = ["reestimate_batch_norm"]


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any], loss_fn: LossFunction) -> nn.Module:
    r"""Gather the running statistics of batch normalisation afresh, as plain averages over batches.

    .. math::
        \mu = \frac1B \sum_b \operatorname{mean}(x_b), \qquad \sigma^2 = \frac1B \sum_b \operatorname{var}(x_b)

    with the unbiased variance and the same share for each batch, so give batches of one size. Only modules of batch
    normalisation that keep statistics are in training mode, so dropout does nothing. Everything else is as before:
    modes, momenta, gradients, and statistics that the batches do not reach. ``num_batches_tracked`` counts the new
    batches. (``torch.optim.swa_utils.update_bn`` calls ``model(batch[0])`` with the whole model in training mode.)

    Batch normalisation without running statistics takes each batch's own and needs nothing.
    ``SyncBatchNorm`` averages over processes, all of which must call this with as many batches.

    Cost: one forward for each batch.

    Args:
        model: Whose statistics are gathered, in place.
        batches: What ``loss_fn`` takes, one after the other. A hundred are plenty.
        loss_fn: ``loss_fn(model, batch)``, the one that is trained with; only its forward matters here.

    Returns:
        The model.

    Raises:
        ValueError: if the model has no running statistics, there are no batches, or the new statistics are not finite;
            the model is as before then, and after any other exception.

    Example:
        Of the two batches the means are 1 and 3, and the variances 2.

        >>> norm = nn.BatchNorm1d(1)
        >>> batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[2.0], [4.0]])]
        >>> norm = reestimate_batch_norm(norm, batches, lambda model, x: model(x).sum())
        >>> norm.running_mean.item(), norm.running_var.item()
        (2.0, 2.0)
    """
    norms = [each for each in model.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no batch normalisation with running statistics: there is nothing to gather"
        )
    modes = {each: each.training for each in model.modules()}
    momenta = [each.momentum for each in norms]
    before = [{name: buffer.clone() for name, buffer in each.named_buffers(recurse=False)} for each in norms]
    done = False
    try:
        for each in modes:  # not model.eval(), which models override to keep parts of them as they are
            each.training = False
        for each in norms:
            each.training, each.momentum = True, None
            each.reset_running_stats()
        number = -1
        for number, batch in enumerate(batches):  # noqa: B007
            loss_fn(model, batch)
        if number < 0:
            raise ValueError("batches is empty: give at least one, and a list where it is gone through several times")
        for each in norms:
            for name, buffer in each.named_buffers(recurse=False):
                if not bool(torch.isfinite(buffer).all()):
                    raise ValueError(f"{name} of {each} would not be finite: leave out the batch that is not")
        done = True
    finally:
        for each, training in modes.items():
            each.training = training
        for each, momentum, buffers in zip(norms, momenta, before, strict=True):
            each.momentum = momentum
            if not done or (each.num_batches_tracked is not None and not each.num_batches_tracked):
                for name, buffer in buffers.items():
                    each.get_buffer(name).copy_(buffer)
    return model
