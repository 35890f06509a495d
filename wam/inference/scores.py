"""How good candidates are: three scores, each (B, N), the higher the better, each row by itself.

    goal        minus the distance between the last imagined frame and the goal's, in latents, over the patches that move
    agreement   the density of the policy's own samples around a candidate
    value       what the value head promises (`wam.inference.value`)

Moving patches are those that differ from the newest observed frame, in the goal or in what any of the row's candidates leads to, by more
than the goal does on average over patches.  All else is background: every candidate imagines it a little wrong, and that is noise.

Agreement is a kernel density and not the distance to the mean: where samples fall into two ways of doing a task, their mean is neither,
and the sample nearest to it the worst of both.  The densest sample lies in the way that most of them take (a step of mean shift; also
what minimum Bayes risk decoding chooses under that kernel).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from wam.codec.codec import Codec

Distance = Literal["l1", "l2"]


def moving_patches(last_BNChw: Tensor, goal_BChw: Tensor, newest_BChw: Tensor) -> Tensor:
    """Bool (B, h, w): the latent patches that move, see the module's docstring; all of them, where the goal is what is seen already."""
    wanted = (goal_BChw - newest_BChw).square().mean(dim=1)
    led = (last_BNChw - newest_BChw.unsqueeze(1)).square().mean(dim=2).amax(dim=1)
    threshold = wanted.mean(dim=(1, 2), keepdim=True)
    return torch.where(threshold > 0, (wanted > threshold) | (led > threshold), True)


def last_pictures(codec: Codec, imagined_BNCkhw: Tensor) -> Tensor:
    """The last frame of each imagined stretch as a picture by itself, in latents (B, N, C, h, w), as a goal image is encoded.

    A latent frame holds four frames and how things move in them; a goal image is one frame, in which nothing moves.  So the last of the
    four is what is compared.
    """
    frames = codec.decode(imagined_BNCkhw.flatten(0, 1), first=False)
    return codec.encode(frames[:, -1:])[:, :, 0].unflatten(0, imagined_BNCkhw.shape[:2])


def goal_scores(last_BNChw: Tensor, goal_BChw: Tensor, newest_BChw: Tensor, distance: Distance = "l1") -> Tensor:
    """Minus the mean distance to the goal's latents over channels and moving patches.

    Args:
        last_BNChw: what each candidate leads to (`last_pictures`).
        newest_BChw: the newest observed frame, likewise.
    """
    moving = moving_patches(last_BNChw, goal_BChw, newest_BChw).unsqueeze(1).to(last_BNChw.dtype)
    apart = last_BNChw - goal_BChw.unsqueeze(1)
    error = (apart.abs() if distance == "l1" else apart.square()).mean(dim=2)
    return -(error * moving).sum(dim=(2, 3)) / moving.sum(dim=(2, 3))


def agreement_scores(actions_BNTA: Tensor) -> Tensor:
    """Density of the samples around each of them, in 0..1: a Gaussian kernel over root mean square distances.

    It is as wide as a quarter of the distances are short: where samples fall into two or three ways, that is a distance within one.

    Args:
        actions_BNTA: normalised; channels that no candidate uses add nothing.
    """
    flat = actions_BNTA.flatten(2)
    apart_BNN = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / flat.shape[-1] ** 0.5
    others = ~torch.eye(flat.shape[1], dtype=torch.bool, device=flat.device)
    width_B = apart_BNN[:, others].quantile(0.25, dim=1)
    near = torch.exp(-apart_BNN.square() / (2 * width_B.square().clamp_min(1e-12))[:, None, None])
    return (near * others).sum(dim=2) / (flat.shape[1] - 1)
