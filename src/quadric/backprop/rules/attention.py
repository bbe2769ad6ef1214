"""Fused attention: its probabilities formed again, then the rules of the two products and the softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quadric.backprop.registry import rule
from quadric.backprop.rules.softmax import through_softmax
from quadric.backprop.saved import first, widened

NOTE = "the products and the softmax inside are exact one by one"


@rule("ScaledDotProductFlashAttentionForCpuBackward0", exact=False, note=NOTE)
def flash_on_cpu(node: Any, g: Any, h: Any) -> tuple[Tensor | None, ...]:
    """The fused kernel of CPUs."""
    mask = node._saved_attn_mask
    return attention(node, first(g), first(h), mask, node._saved_is_causal)


@rule("ScaledDotProductEfficientAttentionBackward0", exact=False, note=NOTE)
def efficient(node: Any, g: Any, h: Any) -> tuple[Tensor | None, ...]:
    """The memory-efficient kernel of GPUs."""
    refuse_dropout(node)
    return attention(node, first(g), first(h), node._saved_attn_bias, node._saved_is_causal)


@rule("ScaledDotProductFlashAttentionBackward0", "ScaledDotProductCudnnAttentionBackward0", exact=False, note=NOTE)
def flash(node: Any, g: Any, h: Any) -> tuple[Tensor | None, ...]:
    """The flash kernels of GPUs."""
    refuse_dropout(node)
    mask = getattr(node, "_saved_attn_bias", None)
    return attention(node, first(g), first(h), mask, node._saved_is_causal)


def refuse_dropout(node: Any) -> None:
    """A fused kernel does not tell which probabilities it dropped.

    Raises:
        RuntimeError: if it dropped any.
    """
    if node._saved_dropout_p:
        raise RuntimeError(
            f"fused attention hides the mask of its dropout, p = {node._saved_dropout_p:g}: run the forward pass under "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or without dropout"
        )


def attention(node: Any, g: Any, h: Any, mask: Tensor | None, causal: bool) -> tuple[Tensor | None, ...]:
    """O = softmax(s Q Kᵀ + mask) V, with each head of K and V serving as many heads of Q as there are for it."""
    q, k, v = (widened(t) for t in (node._saved_query, node._saved_key, node._saved_value))
    factor = node._saved_scale if node._saved_scale is not None else 1 / math.sqrt(q.shape[-1])
    shared = q.shape[-3] // k.shape[-3]
    if shared > 1:
        k, v = (t.repeat_interleave(shared, dim=-3) for t in (k, v))
    heads, lengths = q.shape[:-2], (q.shape[-2], k.shape[-2])
    slope = None if g is None else (g * widened(node._saved_output)).sum(-1, keepdim=True).flatten(0, -3)
    q, k, v = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
    g, h = (None if t is None else t.reshape(-1, *t.shape[-2:]) for t in (g, h))
    scores = torch.bmm(q, k.mT).mul_(factor)
    if causal:
        hidden = torch.ones(lengths, dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(hidden, -math.inf)
    if mask is not None:
        by_head = scores.view(*heads, *lengths)
        by_head.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else by_head.add_(mask)
    p = torch.softmax(scores, -1)
    if mask is not None:
        p.nan_to_num_(0.0)  # as the kernels have it where a row is masked whole
    h_p = None if h is None else torch.bmm(h, (v * v).mT)
    g_p = None if g is None else torch.bmm(g, v.mT)
    h_scores = through_softmax(p, g_p, h_p, -1, slope)
    scaled = h_scores * factor**2
    h_q = torch.bmm(scaled, k * k)
    h_k = torch.bmm(scaled.mT, q * q)
    h_v = None if h is None else torch.bmm((p * p).mT, h)
    h_q, h_k, h_v = (None if t is None else t.view(*heads, *t.shape[-2:]) for t in (h_q, h_k, h_v))
    if shared > 1:
        h_k, h_v = (None if t is None else t.unflatten(-3, (-1, shared)).sum(-3) for t in (h_k, h_v))
    inputs = (h_q, h_k, h_v, h_scores.view(*heads, *lengths))
    return inputs[: len(node.next_functions)]
