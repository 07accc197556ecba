"""Batch normalisation over the whole batch, on every backend.

Each rank holds a slice of the batch; mean and variance are those of all B rows, so that the result
does not depend on the number of ranks. ``torch.nn.SyncBatchNorm`` refuses CPU tensors, and sums of
squares lose digits: this gathers mean, sum of squared deviations and count of each rank and merges
them in rank order (Chan, Golub & LeVeque, 1979), which gives every rank the same bits.

Shape legend: b rows of this rank, B rows of the batch, D width, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from felrec_dist.model.collective import gather_ranks, num_ranks


class WholeBatchNorm(nn.BatchNorm1d):
    """``BatchNorm1d`` whose statistics in training are those of the batch of all ranks.

    The gradient is that of the *sum* of the ranks' losses, as DDP, which averages the gradients of
    the parameters, expects.
    """

    def forward(self, x_bD: Tensor) -> Tensor:
        if not (self.training and num_ranks() > 1):
            return super().forward(x_bD)
        [y_bD] = normalise_together([self], [x_bD])
        return y_bD

    @torch.no_grad()
    def update_running_statistics(
        self, mean_D: Tensor, variance_D: Tensor, num_rows: Tensor
    ) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean_D, self.momentum)
        self.running_var.lerp_(variance_D * (num_rows / (num_rows - 1)), self.momentum)


def normalise_together(norms: Sequence[WholeBatchNorm], xs_bD: Sequence[Tensor]) -> list[Tensor]:
    """Returns what each layer gives in training, (b, D) for its x; the ranks meet once for all of
    them, forward and backward, in the place of once for each.

    Args:
        norms: all with the same eps; one that is named twice sees one x after the other.
        xs_bD: of each layer, of the same number of rows.
    """
    widths = [x_bD.shape[1] for x_bD in xs_bD]
    y_bD, mean_D, variance_D, num_rows = _WholeBatchNorm.apply(  # type: ignore[no-untyped-call]
        torch.cat(list(xs_bD), dim=1),
        torch.cat([norm.weight for norm in norms]),
        torch.cat([norm.bias for norm in norms]),
        norms[0].eps,
    )
    moments = zip(norms, mean_D.split(widths), variance_D.split(widths), strict=True)
    for norm, its_mean_D, its_variance_D in moments:
        norm.update_running_statistics(its_mean_D, its_variance_D, num_rows)
    return list(y_bD.split(widths, dim=1))


class _WholeBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_bD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean_D, variance_D, num_rows = _whole_batch_moments(x_bD)
        inverse_std_D = torch.rsqrt(variance_D + eps)
        normalised_bD = (x_bD - mean_D) * inverse_std_D
        ctx.save_for_backward(normalised_bD, weight_D, inverse_std_D, num_rows)
        ctx.mark_non_differentiable(mean_D, variance_D, num_rows)
        return normalised_bD * weight_D + bias_D, mean_D, variance_D, num_rows

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        gradient_bD: Tensor = gradients[0]
        normalised_bD, weight_D, inverse_std_D, num_rows = ctx.saved_tensors
        bias_gradient_D = gradient_bD.sum(dim=0)
        weight_gradient_D = (gradient_bD * normalised_bD).sum(dim=0)
        sums_2D = gather_ranks(torch.stack([bias_gradient_D, weight_gradient_D])).sum(dim=0)
        mean_gradient_D, mean_projection_D = sums_2D / num_rows
        x_gradient_bD = (gradient_bD - mean_gradient_D - normalised_bD * mean_projection_D) * (
            weight_D * inverse_std_D
        )
        return x_gradient_bD, weight_gradient_D, bias_gradient_D, None


def _whole_batch_moments(x_bD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean (D,), biased variance (D,) and number of rows () of the whole batch.

    The number stays on the device: to read it at every step would have the host wait for a GPU.
    """
    num_local = x_bD.shape[0]
    # A rank with an empty slice contributes zeros and a count of 0.
    mean_D = x_bD.sum(dim=0) / max(1, num_local)
    deviation_D = (x_bD - mean_D).square().sum(dim=0)
    count_D = torch.full_like(mean_D, num_local)
    moments_W3D = gather_ranks(torch.stack([mean_D, deviation_D, count_D]))
    means_WD, deviations_WD, counts_WD = moments_W3D.unbind(dim=1)
    num_rows = counts_WD[:, 0].sum()
    # A rank with two rows knows that they are enough; if they are not, no rank has two.
    if num_local < 2 and num_rows < 2:
        raise ValueError(
            f"batch normalisation needs 2 rows or more in the batch, got {int(num_rows)}"
        )
    mean_D = (means_WD * counts_WD).sum(dim=0) / num_rows
    between_D = (counts_WD * (means_WD - mean_D).square()).sum(dim=0)
    variance_D = (deviations_WD.sum(dim=0) + between_D) / num_rows
    return mean_D, variance_D, num_rows
