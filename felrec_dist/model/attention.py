"""Attention over packed histories, group by group, as one function for autograd.

Left to itself, autograd would put the groups' gradients together from pieces: three tensors a group
stacked into one, the groups' concatenated, each time in new memory. Here every group writes into
its part of one result, forward and backward; inside a group autograd works as ever.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from felrec_dist.model.packing import Group, Packing


def grouped_attention(projected_RC: Tensor, packing: Packing, num_heads: int) -> Tensor:
    """Returns attended values (R, D), heads one after the other.

    Args:
        projected_RC: queries, keys and values side by side, C = 3 D; in each, heads side by side.
        packing: of the rows; rows of no slot are not attended to, and where it is causal no row
            attends to one after it.
        num_heads: H.
    """
    return cast(Tensor, _GroupedAttention.apply(projected_RC, packing, num_heads))  # type: ignore[no-untyped-call]


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected_RC: Tensor, packing: Packing, num_heads: int) -> Tensor:
        num_rows, num_columns = projected_RC.shape
        attended_RD = projected_RC.new_empty(num_rows, num_columns // 3)
        ctx.packing = packing
        ctx.shape = (num_heads, num_columns // 3 // num_heads)
        ctx.graphs = []
        pieces = zip(
            packing.groups,
            projected_RC.split(packing.rows_of_groups),
            packing.is_slot_R.split(packing.rows_of_groups),
            attended_RD.split(packing.rows_of_groups),
            strict=True,
        )
        for group, group_RC, is_slot_R, out_RD in pieces:
            shape = (group.num_histories, group.num_slots, 3, *ctx.shape)
            query_BHSd, key_BHSd, value_BHSd = group_RC.view(shape).permute(2, 0, 3, 1, 4).unbind()
            is_masked = group.is_padded and not packing.is_causal
            mask = is_slot_R.view(group.num_histories, 1, 1, -1) if is_masked else None
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                inputs = [
                    each.detach().requires_grad_(ctx.needs_input_grad[0])
                    for each in (query_BHSd, key_BHSd, value_BHSd)
                ]
                with torch.autocast("cpu", enabled=False):
                    attended_BHSd = F.scaled_dot_product_attention(
                        inputs[0],
                        inputs[1],
                        inputs[2],
                        attn_mask=mask,
                        is_causal=packing.is_causal,
                    )
            _by_slot(out_RD, group, ctx.shape).copy_(attended_BHSd.detach())
            if ctx.needs_input_grad[0]:
                ctx.graphs.append((inputs, attended_BHSd))
        return attended_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        grad_RC = grad_RD.new_empty(len(grad_RD), 3 * grad_RD.shape[1])
        pieces = zip(
            ctx.packing.groups,
            grad_RD.split(ctx.packing.rows_of_groups),
            grad_RC.split(ctx.packing.rows_of_groups),
            strict=True,
        )
        # The last group's graph goes first, and each as soon as it was used.
        for group, group_grad_RD, out_RC in reversed(list(pieces)):
            inputs, attended_BHSd = ctx.graphs.pop()
            grads = torch.autograd.grad(
                attended_BHSd, inputs, _by_slot(group_grad_RD, group, ctx.shape)
            )
            for out_RD, grad_BHSd in zip(out_RC.chunk(3, dim=1), grads, strict=True):
                _by_slot(out_RD, group, ctx.shape).copy_(grad_BHSd)
        return grad_RC, None, None


def _by_slot(rows_RD: Tensor, group: Group, heads: tuple[int, int]) -> Tensor:
    """Returns a view (B, H, S, d) of a group's rows."""
    sizes = (group.num_histories, group.num_slots)
    return rows_RD.unflatten(0, sizes).unflatten(2, heads).transpose(1, 2)
