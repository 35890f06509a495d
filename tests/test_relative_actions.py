"""Actions that are differences to the state at the block's start: what leaves a session is absolute, what enters its memory is relative."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot_fixture import write_dataset
from tiny import TASKS, tiny_config, tiny_episode, tiny_policy

from wam.config import EmbodimentConfig, GroupConfig
from wam.data.dataset import WindowDataset
from wam.data.rotations import from_matrix, to_matrix
from wam.data.units import Units
from wam.inference.session import Session
from wam.pretrained import Policy
from wam.timeline import Kind

RELATIVE = (2, -1, 0, -1)  # the first action starts from state 2, the third from state 0


@pytest.fixture(scope="module")
def policies() -> list[Policy]:
    """The same weights, once with absolute actions and once with two relative ones."""
    absolute = tiny_config()
    robot = EmbodimentConfig("metaworld", 4, 4, relative_to=RELATIVE)
    relative = dataclasses.replace(absolute, model=dataclasses.replace(absolute.model, embodiments=(robot,)))
    return [tiny_policy(config) for config in (absolute, relative)]


def test_plans_start_from_the_state_and_memory_holds_differences(policies: list[Policy]) -> None:
    sessions = [Session(policy, TASKS[:1], "metaworld", [1]) for policy in policies]
    episode = tiny_episode(policies[0].config, 1, 1)
    (frames, state), done = episode.at(0), episode.done(0)
    for session in sessions:
        session.observe(frames, state)
    plain, moved = (session.plan("skip").actions for session in sessions)
    origin = np.where(np.array(RELATIVE) >= 0, state[0][list(RELATIVE)], 0).astype(np.float32)
    np.testing.assert_allclose(moved, plain + origin, rtol=1e-5, atol=1e-5)
    sessions[0].commit(done)
    sessions[1].commit(done + origin)
    written = [session.cache.keys[0][session.cache.kinds_BS == int(Kind.AC)] for session in sessions]
    torch.testing.assert_close(written[1], written[0], rtol=1e-3, atol=1e-4)


def test_relative_actions_need_a_state(policies: list[Policy]) -> None:
    session = Session(policies[1], TASKS[:1], "metaworld", [1])
    session.observe(tiny_episode(policies[1].config, 1, 1).at(0)[0], None)
    with pytest.raises(ValueError, match="relative to the state at the block's start, which was not observed"):
        session.plan("skip")


@pytest.mark.parametrize("clock", [(), ("timeline.first_frame=inside", "timeline.latents_per_block=2", "timeline.actions_per_block=16")], ids=["before", "inside"])
def test_training_and_driving_start_from_the_same_states(clock: tuple[str, ...], tmp_path: Path) -> None:
    """What a window says was done is what a session over the same rows writes into its memory."""
    config = tiny_config("timeline.blocks=2", f"data.root={write_dataset(tmp_path, (40, 40, 40))}", "data.validation_fraction=0", *clock)
    robot = EmbodimentConfig("metaworld", 4, 4, relative_to=RELATIVE)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, embodiments=(robot,)))
    data, t = WindowDataset(config.data, config.timeline, "train", image_size=config.codec.image_size, robot=robot), config.timeline
    start, steps = 5, t.actions_per_block
    sample, view = data[start], data.episode(data.episodes[0])
    session, row, at = Session(tiny_policy(config), TASKS[:1], "metaworld", [1]), start, 0
    for block in range(2):
        frames = sample["frames"][at : (row - start) // t.stride + 1]
        at += len(frames)
        session.observe(frames[None], view.state[row][None])
        done = view.executed[row : row + steps - (t.lead if block == 0 else 0)]
        written = session.units.encode_actions(done[None], session.origin)[0]
        own = slice(block * steps + (t.lead if block == 0 else 0), (block + 1) * steps)
        np.testing.assert_allclose(sample["executed"][own][~sample["action_is_pad"][own]], written[: (~sample["action_is_pad"][own]).sum()], atol=1e-6)
        assert not sample["action_is_pad"][own].all()
        session.commit(done[None])
        row += len(done)


# ------------------------------------------------------------------------------------------------ a hand's pose, in groups


def hand_robot(*, groups: bool) -> EmbodimentConfig:
    """Position, rotation and gripper; or, without groups, the network's numbers of the same robot."""
    if not groups:
        return EmbodimentConfig("metaworld", 10, 10)
    place = GroupConfig("place", 3)
    turn = GroupConfig("turn", 4, rotation="quaternion", network_rotation="rotation_6d")
    grip = GroupConfig("grip", 1, gripper=True)
    moved = (
        dataclasses.replace(place, relative_to="place"),
        dataclasses.replace(turn, size=3, rotation="euler", relative_to="turn"),
        grip,
    )
    return EmbodimentConfig("metaworld", 10, 10, state_groups=(place, turn, grip), action_groups=moved)


def test_a_hand_moves_from_where_it_is_and_remembers_it() -> None:
    """The same weights, once around the network's numbers and once around raw poses."""
    tiny = tiny_config()
    plain, posed = (dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, embodiments=(hand_robot(groups=g),))) for g in (False, True))
    policies = [tiny_policy(config) for config in (plain, posed)]
    sessions = [Session(policy, TASKS[:1], "metaworld", [1]) for policy in policies]
    frames, rng = tiny_episode(plain, 1, 1).at(0)[0], np.random.default_rng(3)
    turned = to_matrix(rng.normal(size=4), "quaternion")
    place, grip = rng.normal(size=3), rng.normal(size=1)
    sessions[0].observe(frames, np.concatenate([place, turned[:2].ravel(), grip])[None].astype(np.float32))
    sessions[1].observe(frames, np.concatenate([place, -2 * from_matrix(turned, "quaternion"), grip])[None].astype(np.float32))
    seen, sent = (session.plan("skip").actions[0] for session in sessions)
    assert seen.shape == (8, 10) and sent.shape == (8, 7)
    np.testing.assert_allclose(sent[:, :3], seen[:, :3] + place, atol=1e-5)
    for row, command in zip(seen, sent, strict=True):  # by hand: two rows made a rotation, which then turns the hand's own
        first = row[3:6] / np.linalg.norm(row[3:6])
        second = row[6:9] - first * (first @ row[6:9])
        second /= np.linalg.norm(second)
        turn = turned @ np.stack([first, second, np.cross(first, second)])
        np.testing.assert_allclose(to_matrix(command[3:6], "euler"), turn, atol=1e-5)
    np.testing.assert_allclose(sent[:, 6], seen[:, 9], atol=1e-6)
    sessions[1].commit(sent[None])
    sessions[0].commit(Units.of(hand_robot(groups=True), posed.data).encode_actions(sent[None], sessions[1].origin))
    written = [session.cache.keys[0][session.cache.kinds_BS == int(Kind.AC)] for session in sessions]
    torch.testing.assert_close(written[1], written[0], rtol=0, atol=0)
    for session in sessions:
        session.imagine(torch.zeros(1, *policies[0].codec.encode(torch.from_numpy(frames)).shape[1:]))
    assert sessions[0].plan("skip").actions is not None, "absolute actions need no state"
    with pytest.raises(ValueError, match="which was not observed"):
        sessions[1].plan("skip")
