"""Prune: remove the weights whose loss costs least, by the curvature of the loss, and let the others answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quadric.layers.targets import Choice
from quadric.matrix import PSDMatrix
from quadric.pruning.evidence import Evidence
from quadric.pruning.gradients import LossFunction, endless, evaluating
from quadric.pruning.operation import CurvatureName, Operation, Request
from quadric.pruning.patterns import Scope, find_pattern
from quadric.pruning.progress import Watch, watcher
from quadric.pruning.result import PruneResult
from quadric.pruning.surgery import Update

__all__ = ["prune"]


def prune(
    model: nn.Module,
    sparsity: float,
    *,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    curvature: CurvatureName | PSDMatrix | Evidence = "fisher",
    num_grads: int = 256,
    block_size: int | None = None,
    damping: float = 1e-5,
    rounds: int = 1,
    parts: int = 1,
    shrinkage: float = 0.0,
    per_example: bool = False,
    window_dtype: torch.dtype | None = None,
    pattern: str = "unstructured",
    scope: Scope = "global",
    update: Update = "joint",
    targets: Choice = None,
    ignore: Choice = None,
    masks: Mapping[str, Tensor] | None = None,
    final: float | None = None,
    progress: bool | Watch = False,
) -> PruneResult:
    r"""Remove the weights that cost the loss least, and move the others to make up for them, in place.

    With :math:`G = \lambda I + \frac1m \sum g_i g_i^\top` from m gradients, removing the weight i alone costs
    :math:`w_i^2 / (2 [G^{-1}]_{ii})`; the cheapest set Q goes, and the kept set S answers at once:

    .. math::
        \delta_Q = -w_Q, \qquad \delta_S = G_S^\top (m\lambda I + G_S G_S^\top)^{-1} G_Q w_Q .

    Cost: ``num_grads`` gradients a round; then O(m²) a weight, or O(block_size²) where blocks are smaller, a part.
    Memory: ``num_grads`` numbers a weight (in bfloat16 where float32 does not fit), or ``block_size`` doubles.

    Args:
        model: Any model; it is run in evaluation mode and its weights are changed. Modes, gradients and everything else
            but what its own forward changes are left as they are, and on any error the weights are as before.
        sparsity: Share of the weights that is zero at the end, 0 ≤ sparsity < 1; of blocks and channels as many go as
            do not exceed it.
        batches: Training data, run through again and again; :math:`g_i` is the gradient of one batch.
        loss_fn: ``loss_fn(model, batch)`` → the mean loss of the batch. At labels sampled from the model,
            :func:`quadric.sampled_loss`, G is the true Fisher matrix.
        curvature: ``"fisher"`` as above; ``"hessian_diagonal"``, optimal brain damage with :math:`|h| + \lambda`;
            ``"magnitude"``, the identity, which needs no data; or any matrix over the weights in the model's order, or
            gradients gathered before, as evidence of :mod:`quadric.pruning.evidence`.
        num_grads: m, gradients a round (batches, where the curvature is the Hessian diagonal).
        block_size: Keep only blocks of G of so many consecutive weights of those that are left; 64 is good, and needs
            the least memory. One block of all sees a few gradients in very many dimensions.
        damping: λ, positive.
        rounds: Times that new gradients are taken, with the density shrinking geometrically from round to round.
        parts: Times a round that weights are chosen and removed with the same gradients, so that a choice knows what
            went before.
        shrinkage: s, from 0 to 1: entries of G off the diagonal are multiplied by 1 − s.
        per_example: Take the gradient of each example of a batch.
        window_dtype: Type to keep gradients in.
        pattern: ``"unstructured"``; ``"N:M"``, at most N of M consecutive inputs stay; ``"block:RxC"`` of the weight
            seen as a matrix of outputs × the rest; ``"channel"``, outputs of layers with their biases and batch norms,
            together those of layers that are added up, and heads of ``nn.MultiheadAttention``.
        scope: ``"global"`` ranks all weights together; ``"layer"`` gives each parameter the same sparsity.
        update: ``"joint"``, the exact answer above; ``"single"``, the paper's sum of the answers to each weight alone;
            ``"none"``.
        targets: Patterns of names (``fnmatch``) of weights or modules, or types of modules; None takes linear,
            convolutional, attention, recurrent and bilinear layers.
        ignore: The same, to leave alone.
        masks: Weights that are removed already and stay so, by name; they count.
        final: The sparsity that this one is a step towards, for ``"N:M"``, which demands its own only at the end; by
            default ``sparsity``.
        progress: True prints a plan and a bar to stderr; a function is called with what is done and the share finished.

    Raises:
        ValueError: if an argument is out of range, the loss or a gradient is not finite, or the gradients do not fit
            into memory.
        RuntimeError: in inference mode, or if ``torch.func`` cannot map the loss over examples.
        UnsupportedOperation: if the Hessian diagonal has no rule for an operation of the loss.

    Example:
        Two weights and the loss (w₁ + w₂ − 2)²/2 at its minimum (1.5, 0.5): to remove the smaller one costs nothing if
        the other goes to 2, and that is what the curvature [[1, 1], [1, 1]] says.

        >>> from quadric import LowRank
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.5, 0.5]]))
        >>> result = prune(model, 0.5, curvature=LowRank(torch.ones(1, 2), damping=1e-6))
        >>> model.weight.detach().round(decimals=3)
        tensor([[2., 0.]])
        >>> result.sparsity
        0.5

    Papers: Frantar, Kurtic and Alistarh, arXiv 2107.03356; Kurtic et al., arXiv 2203.07259; Hassibi and Stork, 1992.
    """
    request = Request(
        sparsity,
        sparsity if final is None else final,
        curvature,
        num_grads,
        block_size,
        damping,
        rounds,
        parts,
        shrinkage,
        per_example,
        window_dtype,
        update,
    )
    request.refuse_missing_data(batches, loss_fn)
    weights, found = find_pattern(pattern, scope, request.final, model, targets, ignore)
    operation = Operation(weights, found, request, masks or {}, watcher(progress))
    before = [p.detach().clone() for p in weights.params]
    try:
        with evaluating(model, weights.params):
            operation.run(model, loss_fn, endless(batches) if batches is not None else iter(()))
        result = operation.result(model)
        operation.watch(f"pruned to {100 * result.sparsity:.2f} %", 1.0)
    except BaseException:
        with torch.no_grad():
            for p, values in zip(weights.params, before, strict=True):
                p.copy_(values)
        raise
    return result
