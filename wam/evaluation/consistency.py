"""Does imagined video follow the actions, and are the actions in it?  Two questions that error against a recording does not answer.

    following     FD(a)  against  FD(a of another episode)      which is nearer to what really followed from a?
    consistency   a  ->  FD(a) = imagined block  ->  IDM  ->  a'      a' - a, beside IDM's own error on the real block

A model that ignores its actions and draws what usually happens may have a good PSNR; its ratio of errors is 1.  Consistency asks block by
block, from observed history: the error of inverse dynamics (IDM) on the imagined block is compared with its error on the real one, and
with the spread of the actions, which is the error of always answering their mean.  An expert's action can be guessed from history, without
a look at the video; so the same is asked with another episode's actions given, which only the video can tell.  Errors are in the network's
normalised units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from wam.config import ImagineConfig
from wam.config_robot import EmbodimentConfig
from wam.evaluation.statistics import wilson
from wam.pictures import moving_mask
from wam.relations import trained_modes, untrained_mode_warning

if TYPE_CHECKING:  # a report reads `sentences`, and should not wait for a model's libraries
    from wam.evaluation.imagination import Clip
    from wam.inference.session import Session
    from wam.pretrained import Policy

SAME = 1e-6  # of the normalised range: a dimension that spreads less than this stands still


# ------------------------------------------------------------------------------------------------ following


def action_following(
    clips: Sequence[Clip], videos: Sequence[np.ndarray], imagine: Callable[[Sequence[Clip]], Sequence[np.ndarray]], real: Sequence[np.ndarray] | None = None
) -> dict[str, Any] | str:
    """Compare the error of forward dynamics under the true actions with that under the actions of another episode's clip.

    Args:
        videos: (F, H, W, 3) imagined from each clip's own actions, the first frame included.
        imagine: makes such videos from clips.
        real: what really followed as the codec shows it, so that its own error does not hide the difference; None: the clips' frames.

    Returns:
        Squared errors over the clips' moving pixels (0..1 colours), their `ratio` (1: actions are ignored; larger is better), the squared
        distance of the two videos (`apart`), in how many clips the true actions' video is the `nearer` one, and how much the actions differed
        (`actions_differ`: 1 is as much as unrelated ones would; where every episode does the same it is less, and so is the ratio); or why
        this cannot be asked.
    """
    partners = partners_of([clip.episode for clip in clips])
    if partners is None:
        return "every clip is of the same few episodes, so there are no other episode's actions for each; use more clips (imagine.clips) or more held-out episodes"
    own_actions, other_actions = (np.stack([clips[i].executed for i in which]).astype(np.float64) for which in (range(len(clips)), partners))
    spread = own_actions.reshape(-1, own_actions.shape[-1]).std(axis=0)
    moves = spread > SAME
    differ = float(np.sqrt((((other_actions - own_actions)[..., moves] / spread[moves]) ** 2).mean() / 2)) if moves.any() else 0.0
    others = [dataclasses.replace(clip, executed=clips[partner].executed) for clip, partner in zip(clips, partners, strict=True)]
    rows = []
    for clip, own, other, came in zip(clips, videos, imagine(others), real or [clip.frames for clip in clips], strict=True):
        mask = moving_mask(clip.frames)
        if mask.any():
            rows.append([_squared_error(own, came, mask), _squared_error(other, came, mask), _squared_error(own, other, mask)])
    if not rows:
        return "nothing moves in any of the clips"
    true, wrong, apart = np.mean(rows, axis=0)
    nearer = sum(row[0] < row[1] for row in rows)
    low, high = wilson(nearer, len(rows))
    return {
        "clips": len(rows),
        "error": float(true),
        "error_other_actions": float(wrong),
        "ratio": float(wrong / true),
        "apart": float(apart),
        "actions_differ": differ,
        "nearer": nearer,
        "nearer_low": low,
        "nearer_high": high,
    }


def partners_of(episodes: Sequence[int]) -> list[int] | None:
    """For each clip another one of a different episode, each used once; None where an episode has more than half of the clips."""
    order = sorted(range(len(episodes)), key=lambda i: episodes[i])
    shift = max(episodes.count(e) for e in set(episodes)) if episodes else 0
    if not episodes or 2 * shift > len(episodes):
        return None
    partners = [0] * len(episodes)
    for place, index in enumerate(order):
        partners[index] = order[(place + shift) % len(order)]
    return partners


def _squared_error(video: np.ndarray, other: np.ndarray, mask: np.ndarray) -> float:
    """Over the frames after the first and the masked pixels, colours in 0..1."""
    return float((((video[1:].astype(np.float64) - other[1:]) / 255) ** 2)[:, mask].mean())


# ------------------------------------------------------------------------------------------------ consistency


def inverse_of_forward(policy: Policy, clips: Sequence[Clip], config: ImagineConfig) -> dict[str, Any] | str:
    """Ask inverse dynamics for the actions of blocks that forward dynamics imagined from them, and of the real blocks.

    Returns:
        Root mean squared errors against the executed actions, and their `spread`, over all dimensions and for each; `unexplained` is the
        squared error as a share of the variance (0: the actions are found; 1: no better than their mean).  `swapped`: forward dynamics was
        given another episode's actions, and these are what is to be found; `swapped_against_own`: how near the answer was to what was done
        instead.  Or why this cannot be asked.
    """
    for mode in ("forward", "inverse"):
        warning = untrained_mode_warning(policy.config, mode)
        if warning:
            return warning
    if policy.config.timeline.first_frame == "inside":
        return "the first frame lies inside block 0 (timeline.first_frame: inside), so that block's actions are not all the robot's"
    asked = _ask(policy, clips, config)
    own = "inverse" in trained_modes(policy.config)
    spread = asked["executed"].std(axis=0)
    out: dict[str, Any] = {
        "blocks": len(clips) * (len(clips[0].executed) // policy.config.timeline.actions_per_block),
        "inverse_is": "trained as mode 'inverse'" if own else "the second half of another trained mode (imagine): the same cells, asked about given video",
        "dimensions": dimension_names(policy.config.model.embodiment(policy.config.data.embodiment)),
        "spread": _overall(spread),
        "spread_by_dimension": spread.tolist(),
    }
    for name in ("imagined", "real"):
        out[name] = errors(asked[name], asked["executed"])
    if "swapped" in asked:
        out["swapped"], out["swapped_against_own"] = errors(asked["swapped"], asked["other"]), errors(asked["swapped"], asked["executed"])
    if "label" in asked:
        out["real_against_label"] = errors(asked["real"], asked["label"])
    return out


def errors(found: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """RMSE and unexplained share of the variance of answers (n, d), over all dimensions and for each (None where a dimension stands still)."""
    squared, variance = ((found - true) ** 2).mean(axis=0), true.var(axis=0)
    share = [float(s / v) if v > SAME**2 else None for s, v in zip(squared, variance, strict=True)]
    whole = float(squared.sum() / variance.sum()) if variance.sum() > SAME**2 else None
    return {"rmse": _overall(np.sqrt(squared)), "unexplained": whole, "rmse_by_dimension": np.sqrt(squared).tolist(), "unexplained_by_dimension": share}


def _overall(by_dimension: np.ndarray) -> float:
    return float(np.sqrt((by_dimension**2).mean()))


def _ask(policy: Policy, clips: Sequence[Clip], config: ImagineConfig) -> dict[str, np.ndarray]:
    """Normalised actions (n, d): `executed`, and IDM's answers for the `imagined` and the `real` block.

    Where clips allow it also the `label`; and another episode's actions, `other`, with the answer for what was imagined from them, `swapped`.
    """
    from wam.inference.session import Session

    t, solver = policy.config.timeline, policy.config.sampling.with_steps(config.steps)
    length, k, frames = t.actions_per_block, t.latents_per_block, t.frames_per_block
    session = Session(policy, [c.instruction for c in clips], policy.config.data.embodiment, [config.seed * 100_003 + i for i in range(len(clips))])
    with torch.no_grad():
        latents = policy.codec.encode(torch.from_numpy(np.stack([c.frames for c in clips])).to(policy.model.device))
    session.observe(np.stack([c.frames[:1] for c in clips]), np.stack([c.state for c in clips]))
    partners = partners_of([c.episode for c in clips])
    found: dict[str, list[np.ndarray]] = {}
    for block in range(len(clips[0].executed) // length):
        steps = slice(block * length, (block + 1) * length)
        given = np.stack([c.executed[steps] for c in clips])
        answers = {"executed": given, "imagined": _returned(session, solver, given)}
        answers["real"] = _actions(session, solver, latents[:, :, 1 + block * k : 1 + (block + 1) * k])
        if partners is not None:
            answers["other"] = given[partners]
            answers["swapped"] = _returned(session, solver, given[partners])
        if all(c.labels is not None for c in clips):
            answers["label"] = np.stack([c.labels[steps] for c in clips if c.labels is not None])
        for name, actions in answers.items():
            normal = session.normalizer.normalize("action", session.units.encode_actions(actions.astype(np.float32), session.origin))
            found.setdefault(name, []).append(normal.reshape(-1, normal.shape[-1]))
        if steps.stop < len(clips[0].executed):
            session.commit(given)
            seen = np.stack([c.frames[1 + block * frames : 1 + (block + 1) * frames] for c in clips])
            session.observe(seen, np.stack([c.states[steps.stop] for c in clips if c.states is not None]))
    return {name: np.concatenate(parts).astype(np.float64) for name, parts in found.items()}


def _returned(session: Session, solver: Any, actions: np.ndarray) -> np.ndarray:
    """IDM(FD(a)) of the coming block."""
    imagined = session.plan("forward", solver, actions).imagined
    assert imagined is not None
    return _actions(session, solver, imagined)


def _actions(session: Session, solver: Any, future: torch.Tensor) -> np.ndarray:
    actions = session.plan("inverse", solver, future=future).actions
    assert actions is not None
    return actions


def dimension_names(robot: EmbodimentConfig) -> list[str]:
    """Names of the network's action dimensions: `arm[0]`, `arm[1]`, `gripper`."""
    names = [f"{g.name}[{i}]" if g.network_size > 1 else g.name for g in robot.action_groups for i in range(g.network_size)]
    return names or [f"action[{i}]" for i in range(robot.action_dim)]


# ------------------------------------------------------------------------------------------------ in words


def sentences(results: Mapping[str, Any]) -> list[str]:
    """What `imagine.json` says of following and consistency, in a sentence each, and what it leaves out; nothing of what it does not hold."""
    said = []
    following, consistency, left_out = (results.get(key) for key in ("action_following", "consistency", "left_out"))
    if isinstance(following, dict) and {"ratio", "nearer", "clips", "nearer_low", "nearer_high", "actions_differ"} <= following.keys():
        f = following
        said.append(
            f"Does imagined video follow the actions? Given another episode's actions, forward dynamics is {f['ratio']:.2f} times as far from what happened as given the true ones "
            f"(1: it ignores them); the true ones are nearer in {f['nearer']} of {f['clips']} clips ({100 * f['nearer_low']:.0f}-{100 * f['nearer_high']:.0f} %; half is chance). "
            f"The actions differed {f['actions_differ']:.2f} times as much as unrelated ones would."
        )
    if isinstance(consistency, dict) and {"imagined", "real", "blocks", "spread", "inverse_is"} <= consistency.keys():
        c = consistency
        said.append(
            f"Are the actions in it? Inverse dynamics leaves {_percent(c['imagined']['unexplained'])} of their variance unexplained on blocks that forward dynamics imagined from them, "
            f"and {_percent(c['real']['unexplained'])} on the real blocks ({c['blocks']} blocks; RMSE {c['imagined']['rmse']:.3f} and {c['real']['rmse']:.3f}, spread {c['spread']:.3f}, normalised units)."
            + (
                f" Given another episode's actions instead, it leaves {_percent(c['swapped']['unexplained'])} of these unexplained: what cannot be guessed from history must be in the video."
                if "swapped" in c
                else ""
            )
            + ("" if c["inverse_is"].startswith("trained as") else f" Inverse dynamics is {c['inverse_is']}.")
        )
    return said + [f"Left out, {name.replace('_', ' ')}: {why}." for name, why in (left_out.items() if isinstance(left_out, dict) else ())]


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None else f"{share:.0%}"
