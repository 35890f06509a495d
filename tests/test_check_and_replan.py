"""Check and replan: a policy that knows two clips by heart, its surprises, what they lead to, and what plans cost."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SMALL, TASKS, tiny_episode, tiny_policy, tiny_preset
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wam.config import CheckConfig, Config, ConfigError, load_config
from wam.config_check import CalibrateConfig, TrialConfig
from wam.data.dataset import collate
from wam.data.mixture import training_data
from wam.evaluation.calibrate import calibrate, measured, table
from wam.evaluation.environments import Event, Observation, StepResult
from wam.evaluation.imagination import Clip
from wam.evaluation.surprise_trial import _drive, summary, text
from wam.inference.adapt import Adaptive, asks_for_motion
from wam.inference.check import LEVELS, SURPRISE, Checker, Floors, Surprise, SurpriseScale, frame_error, imagined_floor, load_scale, observed_floor
from wam.inference.compute import check_flops, plan_flops, remember_flops
from wam.inference.outcome import arrived, newest, outcome
from wam.inference.session import Session
from wam.model.wam import WorldActionModel
from wam.pretrained import Policy, save_pretrained
from wam.training.build import fit_codec
from wam.training.objective import Objective

SAMPLE = Path(__file__).parents[1] / "data" / "metaworld_sample"
STEPS = 16  # control steps a block
FORWARD = CheckConfig(source="forward", threshold=1.5)


# ------------------------------------------------------------------------------------------------ a policy that knows two clips


def _memorised(steps: int = 160) -> tuple[Policy, dict]:
    """Train on two windows of the committed sample (two blocks of two latent frames) until what follows from their actions is known by heart."""
    data = (f"data.root={SAMPLE}", "data.executed_action=action.executed", "codec.image_size=[32, 32]", "codec.fit_frames=200", "training.precision=fp32")
    sizes = ("timeline.blocks=2", "timeline.latents_per_block=2", f"timeline.actions_per_block={STEPS}", "model.video_head=sample", "training.state_dropout=0")
    config = load_config(None, (*SMALL, *data, *sizes, "training.modes={forward: 1, joint: 1}"))
    torch.manual_seed(0)
    windows = training_data(config)
    codec, model = fit_codec(config, windows), WorldActionModel(config)
    batch = collate([windows.windows[0], windows.windows[len(windows) // 2]] * 3)
    objective, optimizer = Objective(config, model, codec), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (steps - step) / (steps / 2))
        optimizer.zero_grad()
        objective(batch, torch.Generator().manual_seed(step)).video().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return Policy(config, model.eval().requires_grad_(False), codec, windows.normalizer, {"control_hz": 80}), batch


@cache
def _known() -> tuple[Policy, tuple[Clip, Clip], SurpriseScale]:
    """A policy that knows two clips by heart, the clips, and the scale of its errors on them."""
    policy, batch = _memorised()
    session = Session(policy, batch["instruction"][:1], "metaworld", [0])
    states, executed = (session.normalizer.unnormalize(key, batch[name][:2].numpy()) for key, name in (("state", "state"), ("action", "executed")))
    clips = [Clip(i, 0, batch["frames"][i].numpy(), states[i, 0], executed[i], batch["instruction"][i], np.repeat(states[i], STEPS, axis=0)) for i in range(2)]
    scale = measured(policy, clips, CalibrateConfig(clips=2, batch=1, forward_steps=(1,), seed=3), "of no file", "two clips")
    return policy, (clips[0], clips[1]), scale


def _surprises(frames: np.ndarray, config: CheckConfig = FORWARD) -> list[Surprise]:
    """Clip 0, of which `frames` came: a check after every latent frame of both blocks."""
    policy, (clip, _), scale = _known()
    checker, session = Checker(policy, config, scale), Session(policy, [clip.instruction], "metaworld", [11])
    session.observe(frames[None, :1], clip.state[None])
    out = []
    for block in range(2):
        came, acted = frames[None, 1 + 8 * block : 9 + 8 * block], clip.executed[None, STEPS * block : STEPS * (block + 1)]
        imagined = outcome(session, [0], acted, policy.config.sampling.with_steps(1), [block]) if config.source == "forward" else session.plan("joint").imagined
        assert imagined is not None
        before = newest(policy, frames[None, 8 * block])[0]
        out += [checker.compare(imagined[0], arrived(session, [0], came[:, : 4 * n])[0], before) for n in (1, 2)]
        session.commit(acted)
        session.observe(came, clip.states[None, -1] if block else clip.states[None, STEPS])  # type: ignore[index]
    return out


@pytest.mark.parametrize("config", [FORWARD, replace(FORWARD, source="plan")], ids=["forward", "plan"])
def test_what_is_known_by_heart_does_not_surprise_and_another_clip_does(config: CheckConfig) -> None:
    _, (clip, other), _ = _known()
    own = _surprises(clip.frames, config)
    assert not any(s.surprised or s.still for s in own) and all(0 < s.value < 1.5 for s in own), own
    swapped = np.concatenate([clip.frames[:13], other.frames[13:]])  # in the second latent frame of the second block
    *calm, last = _surprises(swapped, config)
    assert not any(s.surprised for s in calm) and last.surprised and last.value > 1.5 and last.why.startswith("latent frame 2"), [*calm, last]


def test_a_frozen_picture_surprises_where_motion_was_imagined() -> None:
    _, (clip, _), _ = _known()
    first, second, *_ = _surprises(np.repeat(clip.frames[:1], 17, axis=0))
    assert second.surprised and not first.still and not second.still and "0 patches moved" in second.why


def test_a_scene_that_stays_as_imagined_says_nothing() -> None:
    policy, _, scale = _known()
    checker, before = Checker(policy, FORWARD, scale), torch.randn(24, 8, 8)[: policy.config.codec.channels]
    noise = 0.5 * scale.sources["forward/1"].floors.observed
    near = before.unsqueeze(1) + noise * torch.randn(policy.config.codec.channels, 2, 8, 8).clamp(-1, 1)
    still = checker.compare(near, before.unsqueeze(1).expand(-1, 2, -1, -1), before)
    assert still.still and still.value == 0 and not still.surprised and still.why.startswith("still")
    moved = near.clone()
    moved[:, 1, :3, :3] += 3
    assert checker.compare(near, moved, before).surprised, "came and was not imagined"
    assert checker.compare(moved, near, before).surprised, "was imagined and did not come"
    assert not checker.compare(moved, moved, before).still


def test_outcomes_and_arrivals_leave_a_session_as_it_was() -> None:
    policy, (clip, other), _ = _known()
    pair, plans = [clip, other], []
    for aside in (False, True):
        session = Session(policy, [c.instruction for c in pair], "metaworld", [1, 2])
        session.observe(np.stack([c.frames[:1] for c in pair]), np.stack([c.state for c in pair]))
        acted = np.stack([c.executed[:STEPS] for c in pair])
        if aside:
            both = outcome(session, [1, 0, 1], acted[[1, 0, 0]], None, [5, 6, 7])
            torch.testing.assert_close(both[:2], torch.cat([outcome(session, [i], acted[i : i + 1], None, [s]) for i, s in ((1, 5), (0, 6))]), rtol=1e-4, atol=1e-4)
            early = arrived(session, [1], other.frames[None, 1:5])
        session.commit(acted)
        observed = session.observe(np.stack([c.frames[1:9] for c in pair]), np.stack([c.state for c in pair]))
        plans.append(session.plan("joint"))
    assert torch.equal(early[0], observed[1, :, :1])
    assert np.array_equal(plans[0].actions, plans[1].actions) and torch.equal(plans[0].imagined, plans[1].imagined)
    with pytest.raises(ValueError, match="2 rows, actions for 1 and 1 seeds"):
        outcome(session, [0, 1], acted[:1], None, [0])


# ------------------------------------------------------------------------------------------------ errors and floors


def test_only_patches_that_move_count() -> None:
    floors, before = Floors(0.1, 0.5), torch.zeros(3, 4, 4)
    observed, imagined = before.clone(), before.clone()
    observed[:, 0, 0], imagined[:, 0, 0] = 2.0, 1.0
    alone = frame_error(imagined, observed, before, floors)
    assert (alone.moving, alone.worst, alone.seen, alone.expected) == (1.0, 0.5, 1, 1), "the worst four are one patch and three that stay"
    imagined[:, 3] = 0.4  # a background that is imagined badly, within what imagination wavers by
    assert frame_error(imagined, observed, before, floors) == alone
    imagined[:, 3] = 0.6
    assert frame_error(imagined, observed, before, floors).expected == 5


def test_floors_part_noise_from_motion() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, motion = 0.02 + 0.04 * torch.rand(900, generator=generator), 0.8 + torch.rand(100, generator=generator)
    assert 0.06 < observed_floor(torch.cat([noise, motion])) < 0.8
    assert 0 < observed_floor(torch.cat([torch.zeros(900), motion])) < 0.8, "a simulator has no noise"
    changes, imagined = torch.cat([noise, motion]), torch.cat([torch.linspace(0, 1, 900), motion])
    assert imagined_floor(imagined, changes, 0.2) == pytest.approx(0.99, abs=0.01)
    assert imagined_floor(changes, changes, 0.2) == 0.2
    with pytest.raises(ValueError, match="nothing moves in any of the held-out clips"):
        observed_floor(torch.zeros(10))


# ------------------------------------------------------------------------------------------------ the scale on disk


def test_a_calibrated_checkpoint_keeps_its_scale_and_other_weights_refuse_it(tmp_path: Path) -> None:
    policy, _, _ = _known()
    save_pretrained(policy, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"surprise.json is missing.*run `wam calibrate --checkpoint"):
        load_scale(tmp_path)
    scale = calibrate(tmp_path, CalibrateConfig(clips=2, blocks=1, forward_steps=(1,)))
    loaded = load_scale(tmp_path)
    assert loaded == scale and set(scale.sources) == {"joint/4", "forward/1"} and scale.measured["blocks"] == 2
    source = loaded.source("forward/1")
    assert len(source.horizons) == 2 and len(source.values) == len(LEVELS)
    assert source.exceeded(0) == 1 and source.exceeded(1e6) == 0 and "forward/1" in table(loaded)
    with pytest.raises(ValueError, match=r"not calibrated for 'forward/4' \(it was for joint/4, forward/1\)"):
        Checker(policy, replace(FORWARD, steps=4), loaded)
    plan = Checker(policy, replace(FORWARD, source="plan"), loaded)
    plan.require("joint", 4)
    with pytest.raises(ValueError, match="plans in mode 'skip' imagine no video"):
        plan.require("skip", 4)

    text = (tmp_path / SURPRISE).read_text()
    (tmp_path / SURPRISE).write_text(text[:1000])
    with pytest.raises(ValueError, match=r"cannot be read .*run `wam calibrate"):
        load_scale(tmp_path)
    tree = json.loads(text)
    tree["sources"]["joint/4"]["values"][0] = 99.0
    (tmp_path / SURPRISE).write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="quantiles in order"):
        load_scale(tmp_path)
    (tmp_path / SURPRISE).write_text(text)
    save_pretrained(replace(policy, codec=policy.codec), tmp_path, {k: v + 1e-3 for k, v in policy.model.state_dict().items() if k != "text.encoder.encoder.embed_tokens.weight"})
    with pytest.raises(ValueError, match="is of other weights"):
        load_scale(tmp_path)


def test_what_cannot_be_compared_is_refused() -> None:
    policy, _, scale = _known()
    checker, x = Checker(policy, FORWARD, scale), torch.zeros(6, 2, 8, 8)
    with pytest.raises(ValueError, match=r"do not fit; expected .* 1 to 2 observed"):
        checker.compare(x[:, :1], x, x[:, 0])
    with pytest.raises(ValueError, match="observed latents hold numbers that are not finite"):
        checker.compare(x, x * float("nan"), x[:, 0])
    with pytest.raises(ValueError, match=r"check.source is 'none'"):
        Checker(policy, CheckConfig(), scale)
    with pytest.raises(ConfigError, match=r"check.stalled is 0"):
        CheckConfig(stalled=0)


# ------------------------------------------------------------------------------------------------ told apart, in a simulator


class _Replay:
    """An environment that shows a clip, whatever the robot does; another clip from a control step on."""

    instruction, action_low, action_high = "open the drawer", -np.ones(4, np.float32), np.ones(4, np.float32)

    def __init__(self, clip: Clip, other: Clip | None = None, event: int = 24) -> None:
        frames = clip.frames if other is None else np.concatenate([clip.frames[: 1 + event // 2], other.frames[1 + event // 2 :]])
        self.clip, self.frames, self.event, self.step = clip, frames, event if other is not None else -1, 0

    def reset(self, seed: int) -> Observation:
        return Observation(self.frames[:1], self.clip.state)

    def run(self, actions: np.ndarray, frame_stride: int) -> StepResult:
        first, self.step = self.step, self.step + len(actions)
        frames = self.frames[1 + first // frame_stride : 1 + self.step // frame_stride]
        events = (Event("arm_pushed", self.event, 0.1, "m", 1),) if first <= self.event < self.step else ()
        return StepResult(frames, np.repeat(self.clip.state[None], len(actions), 0), np.zeros(len(actions), np.float32), np.zeros(len(actions), np.bool_), self.step == 2 * STEPS, events)


def test_a_trial_counts_latent_frames_from_the_event() -> None:
    policy, (clip, other), scale = _known()
    checker, config = Checker(policy, replace(FORWARD, source="plan"), scale), TrialConfig(mode="joint")
    calm, disturbed = (_drive(policy, checker, _Replay(clip, swap), config, 5) for swap in (None, other))  # type: ignore[arg-type]
    assert (calm["began"], disturbed["began"], disturbed["steps_per_frame"]) == (None, 24, 8) and len(calm["values"]) == 4
    assert calm["values"][:3] == pytest.approx(disturbed["values"][:3]) and disturbed["values"][3] > 1.5 > max(calm["values"])
    told = summary([{"kind": "none", **calm}, {"kind": "arm_pushed", **disturbed}])
    first, *later = told["kinds"]["arm_pushed"]
    assert first["auroc"] == 1 and first["frames"] == 1 and all(row == {"frames": 0} for row in later), "the episode ends with the frame of the event"
    assert told["undisturbed"]["frames"] == 4 and "arm_pushed" in text(told)


# ------------------------------------------------------------------------------------------------ adaptive imagination

CALM, STILL, WILD = Surprise(0.3, False, "calm"), Surprise(0.0, False, "still", still=True), Surprise(2.0, True, "wild")


def test_a_surprise_replans_and_escalates_for_some_plans() -> None:
    robot = Adaptive(CheckConfig(source="forward", escalate="imagine", escalated_plans=2))
    with pytest.raises(ValueError, match=r"call begin\(mode\)"):
        robot.next()
    robot.begin("skip")
    assert robot.next() == "skip" and robot.saw(CALM) == "go on" and robot.next() == "skip"
    assert robot.saw(WILD) == "replan"
    assert [robot.next() for _ in range(3)] == ["imagine", "imagine", "skip"]
    robot.saw(WILD)
    assert robot.next() == "imagine" and robot.saw(WILD) == "replan", "surprised again: counted anew"
    assert [robot.next() for _ in range(3)] == ["imagine", "imagine", "skip"]
    assert robot.plans == {("skip", False): 4, ("imagine", True): 5} and (robot.checks, robot.surprises) == (4, 3)
    robot.begin("joint")
    assert robot.next() == "joint" and not robot.surprises


def test_what_goes_on_being_odd_is_no_news() -> None:
    robot = Adaptive(CheckConfig(source="forward", escalate="imagine", escalated_plans=1, escalate_again="after_calm"))
    robot.begin("skip")
    answers, modes = zip(*((robot.saw(s), robot.next()) for s in (WILD, WILD, WILD, CALM, WILD, WILD)), strict=True)
    assert modes == ("imagine", "skip", "skip", "skip", "imagine", "skip"), "thought about once, until all was calm again"
    assert answers == ("replan",) * 3 + ("go on",) + ("replan",) * 2, "it replans all the same"
    robot.begin("skip")
    assert robot.saw(WILD) == "replan" and robot.next() == "imagine", "a new episode knows nothing of the last"


@pytest.mark.parametrize(("then", "verdict"), [("stop", "stop"), ("nothing", "go on")])
def test_what_a_surprise_leads_to_is_configured(then: str, verdict: str) -> None:
    robot = Adaptive(CheckConfig(source="forward", then=then, escalated_steps=9))  # type: ignore[arg-type]
    robot.begin("skip")
    how = Config().sampling
    assert robot.sampling(how) == how and robot.saw(WILD) == verdict
    assert robot.sampling(how).steps == 9 and robot.next() == "skip", "the same mode, sampled with more steps"


def test_standing_still_is_a_surprise_only_when_told_to_move_and_for_long() -> None:
    robot = Adaptive(CheckConfig(source="forward", stalled=3))
    robot.begin("skip")
    assert [robot.saw(s) for s in (STILL, STILL, CALM, STILL, STILL)] == ["go on"] * 5, "motion in between begins anew"
    assert robot.saw(STILL) == "replan" and robot.stalls == 1 and robot.saw(STILL) == "go on"
    robot.begin("skip")
    assert [robot.saw(STILL, acted=False) for _ in range(9)] == ["go on"] * 9


def test_which_actions_ask_for_motion() -> None:
    policy = _known()[0]
    session = Session(policy, ["open the drawer"] * 3, "metaworld", [0, 1, 2])
    actions = np.zeros((3, 4, 4), np.float32)
    actions[1, 2, 0] = 0.5
    actions[2, :, 3] = 1.0
    kinds = [g.kind for g in session.dims.action_groups]
    moves = asks_for_motion(session, actions)
    assert moves[1] and (moves.tolist() == [False, True, False] or kinds != ["delta", "target"])


# ------------------------------------------------------------------------------------------------ what plans cost


def _counted(call) -> int:  # type: ignore[no-untyped-def]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [("all", ()), ("all", ("sampling.guidance=2.5", "training.text_dropout=0.1", "sampling.action_steps=2")), ("uwm", ()), ("dreamzero", ("timeline.blocks=4",))],
    ids=["all", "guided", "a single copy", "live states"],
)
def test_flops_of_a_plan_are_those_that_are_computed(preset: str, overrides: tuple[str, ...]) -> None:
    config = tiny_preset(preset, None, *overrides, "model.attention=sdpa")
    policy, past = tiny_policy(config), {"all": 3, "uwm": 0, "dreamzero": 3}[preset]
    episode, session = tiny_episode(config, 1, past + 2), Session(policy, TASKS[:1], "metaworld", [0])
    for block in range(past + 1):
        session.observe(*episode.at(block))
        if block < past:
            session.commit(episode.done(block))
    for mode in {"all": ("skip", "skip_registers", "joint", "imagine", "forward"), "uwm": ("imagine", "forward"), "dreamzero": ("joint_mutual", "forward")}[preset]:
        given = episode.done(past) if mode == "forward" else None
        assert _counted(lambda: session.plan(mode, actions=given)) == plan_flops(policy, mode), mode  # noqa: B023
    if preset == "all":
        session.commit(episode.done(past))
        encode = _counted(lambda: arrived(session, [0], episode.at(past + 1)[0]))
        assert _counted(lambda: (session.observe(*episode.at(past + 1)), session.commit(episode.done(past + 1)))) == remember_flops(policy) + encode


def test_an_episode_costs_its_plans_and_their_checks() -> None:
    policy = tiny_policy(tiny_preset("all"))
    check, how = CheckConfig(source="forward", steps=2, escalate="imagine", escalated_plans=1), policy.config.sampling
    robot = Adaptive(check)
    robot.begin("skip")
    for surprise in (CALM, WILD, CALM):
        robot.next()
        robot.saw(surprise)
    robot.next()
    assert check_flops(policy, check) == plan_flops(policy, "forward", how.with_steps(2)) > 0
    assert robot.flops(policy, how) == 3 * plan_flops(policy, "skip") + plan_flops(policy, "imagine") + 4 * check_flops(policy, check)
    assert plan_flops(policy, "skip") < plan_flops(policy, "imagine") and check_flops(policy, CheckConfig(source="plan")) == 0
