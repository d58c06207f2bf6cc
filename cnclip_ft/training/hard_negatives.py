"""Every picture against texts of its own that are not true of it, beside the batch.

For a pair with unit features x, y and the features n₁ … n_K of its negatives::

    softmax:  −log( exp(s·x·y) / (exp(s·x·y) + Σ exp(s·x·n_k)) )        (FG-CLIP 2, arXiv 2510.10921)
    sigmoid:  Σ −log σ(−(s·x·n_k + b))                                   each negative one more pair of SigLIP's loss

the mean over all pairs of the global batch; a pair without negatives counts 0. Negatives stand against their own picture alone (NegCLIP,
arXiv 2210.01936, has them as columns of all): of other pictures nobody knows that they are not true, nothing has to be exchanged between
devices, and the loss does not depend on who else is in the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cnclip_ft.collectives import sum_over_ranks, world_size
from cnclip_ft.training.loss import Objective


def against_negatives(
    objective: Objective,
    images: torch.Tensor,
    texts: torch.Tensor,
    present: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss (module docstring), a scalar with gradient, of the kind and over the `dimensions` of `objective`.

    Args:
        images: unit ``[n, dim]``. texts: unit ``[n, 1 + K, dim]``, the true one first.
        present: bool ``[n, K]``; False: there is no such negative, whatever stands there.
        logit_scale: in log space.

    As the losses of `training.loss`: the value is that of the global batch on every device, its gradient W times the device's share.
    """
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    with torch.autocast(images.device.type, enabled=False):
        x, y, scale = images.to(dtype), texts.to(dtype), logit_scale.to(dtype).exp()
        bias = None if logit_bias is None or not objective.biased else logit_bias.to(dtype)
        losses = [_loss(x, y, present, scale, bias)]
        for width in objective.dimensions:
            cut_x, cut_y = (F.normalize(each[..., :width], dim=-1) for each in (x, y))
            losses.append(_loss(cut_x, cut_y, present, scale, bias))
        loss = torch.stack(losses).mean()
        everywhere = sum_over_ranks(loss.detach().clone()) / world_size()
        return loss + (everywhere - loss.detach())


def _loss(
    images: torch.Tensor, texts: torch.Tensor, present: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    logits = scale * torch.einsum("nd,nkd->nk", images, texts)
    if bias is not None:
        return F.softplus(logits[:, 1:] + bias).masked_fill(~present, 0.0).sum() / len(images)
    others = logits[:, 1:].masked_fill(~present, -torch.inf)
    return (torch.cat([logits[:, :1], others], 1).logsumexp(1) - logits[:, 0]).sum() / len(images)
