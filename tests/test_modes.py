"""Every mode of every preset: cached = uncached, and a plan = the solver over whole windows.

    a session's memory, block by block    ==    the teacher-forced forward over the whole window, under the mode's mask

One memory serves all modes: each is asked in every block, which also shows that asking leaves nothing behind.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import pytest
import torch
from tiny import IMAGE_DIM, TASKS, Episode, tiny_episode, tiny_policy, tiny_preset, window_of
from torch import Tensor

from wam.config import Config, SamplingConfig
from wam.inference.session import Session
from wam.model.cache import KVCache
from wam.model.conditions import Conditions
from wam.model.sampling import Noise, sample
from wam.model.wam import Noisy, Window, WorldActionModel
from wam.pretrained import Policy
from wam.relations import LeakError, Mode, Reach
from wam.solvers import make_grid, make_solver
from wam.timeline import Kind, Layout
from wam.training.objective import Objective

V, A, VC, AC, S = Kind.V, Kind.A, Kind.VC, Kind.AC, Kind.S
EXPERTS = [None, 32]


@dataclass(frozen=True)
class Case:
    """A preset on tiny sizes, and how many blocks are driven; with a history shorter than these, the first of them are gone in the end."""

    preset: str
    blocks: int
    overrides: tuple[str, ...] = ()

    def config(self, expert: int | None) -> Config:
        return tiny_preset(self.preset, expert, *self.overrides)


CASES = {
    "all": Case("all", 4, ("timeline.history=2",)),
    "two frames a block": Case("all", 3, ("timeline.history=1", "timeline.latents_per_block=2", "timeline.actions_per_block=16")),
    "sink and goal": Case("all", 4, ("timeline.history=1", "timeline.sink=true", "model.goal_image=true")),
    "first frame on the channels": Case("all", 4, ("timeline.history=2", "model.first_frame=concat", f"model.image_dim={IMAGE_DIM}", "model.goal_image=true")),
    "state in the text": Case("all", 3, ("timeline.history=1", "model.state=context")),
    "dreamzero": Case("dreamzero", 4, ("timeline.history=2",)),
    "lingbot_va": Case("lingbot_va", 3),
    "ge_act": Case("ge_act", 4, ("timeline.history=2",)),
    **{preset: Case(preset, 1) for preset in ("fast_wam", "uwm", "vla")},
}


@cache
def _policy(name: str, expert: int | None) -> Policy:
    return tiny_policy(CASES[name].config(expert))


def _modes(model: WorldActionModel) -> list[Mode]:
    """The modes that do not leak."""
    modes = []
    for name in model.relations.modes:
        try:
            modes.append(model.relations.mode(name))
        except LeakError:
            assert (name, model.config.preset) == ("forward", "lingbot_va")
    return modes


def _session(policy: Policy, episode: Episode) -> Session:
    rows = len(episode.frames)
    return Session(policy, TASKS[:rows], "metaworld", list(range(rows)), episode.goals if policy.config.model.goal_image else None)


def _drive(session: Session, episode: Episode, blocks: int, ask: Callable[[], None] = lambda: None) -> None:
    """Observe and act, and `ask` as each block is to be planned; stops before the last block's actions."""
    for block in range(episode.first_block, blocks):
        session.observe(*episode.at(block))
        assert session.block == block
        ask()
        if block < blocks - 1:
            session.commit(episode.done(block))


# ------------------------------------------------------------------------------------------------ without a cache


def _conditions(policy: Policy, episode: Episode, window: Window, instructions: list[str] = TASKS) -> Conditions:
    """As training makes them."""
    objective = Objective(policy.config, policy.model, policy.codec, policy.image)
    assert window.state_BNS is not None
    batch = {"instruction": instructions[: len(episode.frames)], "frames": torch.from_numpy(episode.frames)}
    return objective.conditions_of(batch, window.state_BNS, window.embodiment_B)


def _teacher(model: WorldActionModel, window: Window, conditions: Conditions, mode: Mode, lost: Callable[[Layout], Tensor] | None = None) -> dict[Kind, Tensor]:
    """Velocities of all blocks (without a noisy first frame's) in one forward; `lost`: what a memory no longer has, (L, L)."""
    t = model.config.timeline
    layout = model.training_layout(window.noisy_action_BTA.shape[1] // t.actions_per_block)
    mask = mode.table.dense(layout, Reach.of(t))
    mask = mask if lost is None else mask & ~lost(layout)
    video, action = model.forward_train(window, conditions, mask[None, None].expand(len(window.embodiment_B), -1, -1, -1), layout)
    return {V: video[:, :, int(model.config.training.predict_first_frame) :], A: action}


def _pinned(window: Window, mode: Mode) -> Window:
    """What a mode pins, at its level."""
    levels = {V: "video_t_BF", A: "action_t_BT"}
    return replace(window, **{levels[kind]: torch.full_like(getattr(window, levels[kind]), 1000 * level) for kind, level in mode.pinned.items()})


def _without_state(model: WorldActionModel, live: tuple[Kind, ...]) -> bool:
    """A state that takes the actions' level has none where there are no actions, and is then left out."""
    return model.live_state and A not in live


def _no_states(layout: Layout) -> Tensor:
    states = layout.kinds_L == int(S)
    return states[None, :] & ~states[:, None]


# ------------------------------------------------------------------------------------------------ with one


def _noisy(model: WorldActionModel, window: Window, block: int, live: tuple[Kind, ...]) -> Noisy:
    """One block of a window's noisy part."""
    t = model.config.timeline
    first = block * t.latents_per_block + model.config.training.predict_first_frame
    frames = slice(first, first + t.latents_per_block)
    actions = slice(block * t.actions_per_block, (block + 1) * t.actions_per_block)
    video = (window.noisy_BCFHW[:, :, frames], window.video_t_BF[:, frames]) if V in live else (None, None)
    action = (window.noisy_action_BTA[:, actions], window.action_t_BT[:, actions]) if A in live else (None, None)
    assert window.state_BNS is not None
    return Noisy(*video, *action, window.state_BNS[:, block : block + 1] if model.live_state and A in live else None)


def _given(model: WorldActionModel, window: Window, block: int, kind: Kind) -> Tensor:
    """One block of a window's clean part."""
    t = model.config.timeline
    if kind is AC:
        return window.executed_BTA[:, block * t.actions_per_block : (block + 1) * t.actions_per_block]
    first = block * t.latents_per_block + (t.first_frame == "before")
    return window.clean_BCFHW[:, :, first : first + t.latents_per_block]


def _cached(session: Session, window: Window, mode: Mode, live: tuple[Kind, ...]) -> dict[Kind, Tensor]:
    """Velocities of the coming block against a session's memory, which is left as it was."""
    model, at = session.model, session._situation(None)
    contents = {kind: (_given(model, window, session.block, kind), 0.0) for kinds in mode.given.values() for kind in kinds}
    if V in mode.pinned and V not in live:
        contents[V] = (_noisy(model, window, session.block, (V,)).video_BCFHW, 1000 * mode.pinned[V])
    for kind, (value, level) in contents.items():
        model.prefill(at.cache, mode.table, kind, value, at.blocks, at.conditions, at.embodiment_B, level)
    view = model.view(at.cache, mode.table, live, at.blocks)
    video, action = model.denoise(view, _noisy(model, window, session.block, live), at.conditions, at.embodiment_B)
    for kind in contents:
        at.cache.drop(kind, at.blocks)
    return {kind: x for kind, x in ((V, video), (A, action)) if x is not None}


def _ways(model: WorldActionModel, mode: Mode) -> list[tuple[Kind, ...]]:
    """Which noisy tokens may go through the network: those a mode needs; all of them; actions alone, with registers kept in the memory."""
    ways = [mode.live]
    if mode.name == "skip":
        ways.append((V, A))
    if _steady(model, mode):
        ways.append((A,))
    return ways


def _steady(model: WorldActionModel, mode: Mode) -> bool:
    """Do registers see nothing that changes from step to step?"""
    return bool(mode.pinned.get(V)) and not mode.sees(V, A) and not (model.live_state and mode.sees(V, S))


# ------------------------------------------------------------------------------------------------ cached = uncached


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("name", CASES)
def test_cached_equals_uncached(name: str, expert: int | None, batch: int) -> None:
    """Every mode, every block, also after the first blocks have left the history."""
    policy, blocks = _policy(name, expert), CASES[name].blocks
    episode = tiny_episode(policy.config, batch, blocks)
    window, session = window_of(policy, episode, blocks), _session(policy, episode)
    asked = [(mode, live) for mode in _modes(policy.model) for live in _ways(policy.model, mode)]
    found: list[dict[Kind, list[Tensor]]] = [{kind: [] for kind in live} for _, live in asked]

    def ask() -> None:
        for (mode, live), velocities in zip(asked, found, strict=True):
            for kind, velocity in _cached(session, _pinned(window, mode), mode, live).items():
                velocities[kind].append(velocity)

    with torch.no_grad():
        _drive(session, episode, blocks, ask)
        conditions = _conditions(policy, episode, window)
        for (mode, live), velocities in zip(asked, found, strict=True):
            expected = _teacher(policy.model, _pinned(window, mode), conditions, mode, _no_states if _without_state(policy.model, live) else None)
            for kind, parts in velocities.items():
                assert float(expected[kind].abs().mean()) > 0.02
                _close(torch.cat(parts, dim=2 if kind is V else 1), expected[kind], f"{mode.name}, {kind.label} of {[k.label for k in live]}")


def _close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("frames", [1, 2])
def test_memory_in_segments_forgets_as_it_is_asked(frames: int, expert: int | None, batch: int) -> None:
    """LingBot-VA's window slides by segments, and what it has left does not come back: a plan's actions are one segment ahead of the video
    that is observed after them, and take the oldest segment from it."""
    history, blocks = 3, 5
    sizes = (f"timeline.latents_per_block={frames}", f"timeline.actions_per_block={8 * frames}", f"timeline.history={history}")
    policy = tiny_policy(tiny_preset("lingbot_va", expert, *sizes))
    episode = tiny_episode(policy.config, batch, blocks)
    window, session = window_of(policy, episode, blocks), _session(policy, episode)
    video, imagine = (policy.model.relations.mode(name) for name in ("video", "imagine"))
    found: dict[int, dict[Kind, Tensor]] = {}

    def ask() -> None:
        found[session.block] = _cached(session, window, video, (V,)) | _cached(session, window, imagine, (A,))

    def lost(block: int, layout: Layout) -> Tensor:
        age = 2 * layout.blocks_L + torch.isin(layout.kinds_L, torch.tensor([int(A), int(AC)]))
        observed = (layout.kinds_L == int(VC)) & (layout.blocks_L < block)
        return observed[:, None] & (age[None, :] == age[:, None] - history)

    with torch.no_grad():
        _drive(session, episode, blocks, ask)
        conditions = _conditions(policy, episode, window)
        for block, velocities in found.items():
            for kept, forgets in ((True, partial(lost, block)), (False, None)):
                expected = _teacher(policy.model, window, conditions, imagine, forgets)
                in_block = expected[V].unflatten(2, (-1, frames))[:, :, block], expected[A].unflatten(1, (-1, 8 * frames))[:, block]
                for kind, x in zip((V, A), in_block, strict=True):
                    if kept:
                        _close(velocities[kind], x, f"{kind.label} of block {block}")
                    elif block == blocks - 1:
                        assert not torch.allclose(velocities[kind], x, rtol=1e-4, atol=2e-5), "the history is shorter than the drive"


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("name", ["all", "first frame on the channels", "dreamzero", "lingbot_va"])
def test_rows_at_different_blocks_get_what_they_would_get_alone(name: str, expert: int | None) -> None:
    policy, at = _policy(name, expert), [0, 2, 1]
    model, episode = policy.model, tiny_episode(policy.config, 3, 3)
    window, sessions = window_of(policy, episode, 3), [_session(policy, episode) for _ in at]
    with torch.no_grad():
        for session, block in zip(sessions, at, strict=True):
            _drive(session, episode, block + 1)
        together = KVCache.concat([session.cache.select([row]) for row, session in enumerate(sessions)])
        for mode in _modes(model):
            window_m, live = _pinned(window, mode), (V, A)
            if mode.given:
                continue
            noisy = [_noisy(model, window_m, block, live) for block in at]
            rows = {f: [getattr(n, f) for n in noisy] for f in Noisy.__dataclass_fields__}
            own = Noisy(**{f: None if x[0] is None else torch.stack([part[row] for row, part in enumerate(x)]) for f, x in rows.items()})
            out = model.denoise(model.view(together, mode.table, live, at), own, sessions[0].conditions, window.embodiment_B)
            for row, session in enumerate(sessions):
                alone = _cached(session, window_m, mode, live)
                for kind, velocity in zip(live, out, strict=True):
                    _close(velocity[row], alone[kind][row], f"{mode.name}, {kind.label} of row {row}")


# ------------------------------------------------------------------------------------------------ a plan


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("name", ["all", "sink and goal", "dreamzero", "fast_wam", "lingbot_va", "uwm"])
def test_a_plan_is_the_solver_over_whole_windows(name: str, expert: int | None, batch: int) -> None:
    """Sampling against the memory gives what stepping the last block of a window gives, the whole of it computed anew at every step."""
    policy, blocks = _policy(name, expert), CASES[name].blocks
    episode, how = tiny_episode(policy.config, batch, blocks), SamplingConfig(steps=3)
    window, session = window_of(policy, episode, blocks), _session(policy, episode)
    generator = torch.Generator().manual_seed(3)
    start = [torch.randn(x.shape, generator=generator) for x in (_given(policy.model, window, 0, AC), _given(policy.model, window, 0, VC))]
    with torch.no_grad():
        _drive(session, episode, blocks)
        conditions = _conditions(policy, episode, window)
        for mode in _modes(policy.model):
            given = {"forward": _given(policy.model, window, session.block, AC), "inverse": _given(policy.model, window, session.block, VC)}.get(mode.name)
            plan = sample(policy.model, mode, replace(session._situation(None), held=replace(session._held(None), video=None, action=None)), Noise(*start), how, given)
            expected = _stepped(policy.model, mode, window, conditions, dict(zip((A, V), start, strict=True)), how.steps, given)
            for kind, x in ((V, plan.video_BCFHW), (A, plan.action_BTA)):
                assert (x is None) == (kind not in expected), f"{mode.name}: {kind.label}"
                if x is not None:
                    _close(x, expected[kind], f"{mode.name}, {kind.label}")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("preset", ["all", "dreamzero", "lingbot_va"])
def test_a_guided_plan_steps_video_away_from_the_other_instruction(preset: str, expert: int | None, batch: int) -> None:
    """Each side has a memory and a trajectory of its own context; guidance acts on video, actions are the instruction's own."""
    scale, blocks = 2.5, 2
    policy = tiny_policy(tiny_preset(preset, expert, f"sampling.guidance={scale}", "training.text_dropout=0.1", "sampling.negative_prompt=blurred"))
    episode, how = tiny_episode(policy.config, batch, blocks), SamplingConfig(steps=3, guidance=scale)
    window, session = window_of(policy, episode, blocks), _session(policy, episode)
    generator = torch.Generator().manual_seed(3)
    start = {kind: torch.randn(_given(policy.model, window, 0, clean).shape, generator=generator) for kind, clean in ((A, AC), (V, VC))}
    with torch.no_grad():
        _drive(session, episode, blocks)
        sides = [_conditions(policy, episode, window, texts) for texts in (TASKS, ["blurred"] * 3)]
        for mode in (policy.model.relations.mode(name) for name in ("joint", "joint_mutual", "imagine")):
            plan = sample(policy.model, mode, session._situation(None), Noise(start[A], start[V]), how)
            expected = _stepped(policy.model, mode, window, sides[0], start, how.steps, None, (sides[1], scale))
            unguided = _stepped(policy.model, mode, window, sides[0], start, how.steps, None)
            for kind, x in ((V, plan.video_BCFHW), (A, plan.action_BTA)):
                _close(x, expected[kind], f"{mode.name}, {kind.label}")
            assert not torch.allclose(expected[V], unguided[V], atol=1e-2)


def _stepped(
    model: WorldActionModel,
    mode: Mode,
    window: Window,
    conditions: Conditions,
    start: dict[Kind, Tensor],
    steps: int,
    given: Tensor | None,
    away: tuple[Conditions, float] | None = None,
) -> dict[Kind, Tensor]:
    """Euler over `forward_train`, on the last block of a window; `away`: the other side of guidance on video, and its scale."""
    out: dict[Kind, Tensor] = {}
    if mode.name == "imagine":
        video = _stepped(model, model.relations.mode("video"), window, conditions, start, steps, None, away)[V]
        clean = window.clean_BCFHW
        window = replace(window, clean_BCFHW=torch.cat([clean[:, :, : -video.shape[2]], video], dim=2))
        out[V], given = video, video
    x = dict(start)
    for kind, level in mode.pinned.items():
        x[kind] = given if level == 0 and given is not None else x[kind]
    solvers = {}
    for kind in mode.denoised:
        grid = make_grid("euler", steps, (model.config.noise.video if kind is V else model.config.noise.action).shift)
        solvers[kind] = (make_solver("euler", grid), grid.timesteps)
    for i in range(steps):
        levels = {kind: 1000 * mode.pinned.get(kind, 0.5) if kind not in solvers else float(solvers[kind][1][i]) for kind in (V, A)}
        lost = _no_states if _without_state(model, mode.live) else None
        now = _at_the_end(window, x, levels)
        velocities = _teacher(model, now, conditions, mode, lost)
        if away is not None and V in solvers:
            other = _teacher(model, now, away[0], mode, lost)[V]
            velocities[V] = other + away[1] * (velocities[V] - other)
        for kind, (solver, _) in solvers.items():
            last = velocities[kind][:, :, -x[V].shape[2] :] if kind is V else velocities[kind][:, -x[A].shape[1] :]
            x[kind] = solver.step(last, i, x[kind])
    return out | {kind: x[kind] for kind in mode.denoised}


def _at_the_end(window: Window, x: dict[Kind, Tensor], levels: dict[Kind, float]) -> Window:
    """The window with these noisy tokens in its last block."""
    k, a = x[V].shape[2], x[A].shape[1]
    video_t, action_t = window.video_t_BF.clone(), window.action_t_BT.clone()
    video_t[:, -k:], action_t[:, -a:] = levels[V], levels[A]
    noisy = torch.cat([window.noisy_BCFHW[:, :, :-k], x[V]], dim=2)
    return replace(window, noisy_BCFHW=noisy, noisy_action_BTA=torch.cat([window.noisy_action_BTA[:, :-a], x[A]], dim=1), video_t_BF=video_t, action_t_BT=action_t)


# ------------------------------------------------------------------------------------------------ without noisy video


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("name", ["all", "dreamzero", "fast_wam", "lingbot_va"])
def test_skip_actions_do_not_change_when_noisy_video_is_removed(name: str, expert: int | None, batch: int) -> None:
    """In a whole window; against a memory, `test_cached_equals_uncached` holds both ways equal to this one."""
    policy, blocks = _policy(name, expert), CASES[name].blocks
    model, episode = policy.model, tiny_episode(policy.config, batch, blocks)
    window, reach = window_of(policy, episode, blocks), Reach.of(policy.config.timeline)
    whole = model.training_layout(blocks)
    bare = Layout(tuple(s for s in whole.segments if s.kind is not V))
    assert len(bare) < len(whole)
    mode = model.relations.mode("skip")
    with torch.no_grad():
        conditions, actions = _conditions(policy, episode, window), []
        for layout in (whole, bare):
            hidden = model.hidden_train(window, conditions, mode.table.dense(layout, reach)[None, None], layout)
            span, first = layout.span(A), layout.video_tokens
            actions.append(model.action_velocity(hidden, slice(span.start - first, span.stop - first), window.embodiment_B))
        joint = _teacher(model, window, conditions, model.relations.mode("joint"))[A]
    _close(actions[1], actions[0], "actions")
    assert not torch.allclose(joint, actions[0], atol=1e-3), "in joint they do"
