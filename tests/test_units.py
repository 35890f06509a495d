"""Raw columns to the network and back: every form of rotation, relative and absolute, and statistics over every (row, offset)."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot_fixture import write_dataset, write_flavour

from wam.config import ConfigError, DataConfig, EmbodimentConfig, TimelineConfig, from_dict
from wam.data.lerobot import DatasetError, LeRobotDataset
from wam.data.normalize import by_embodiment, normalizer_for
from wam.data.rotations import convert, from_matrix, to_matrix
from wam.data.units import Units

SIZES = {"quaternion": 4, "quaternion_wxyz": 4, "euler": 3, "axis_angle": 3, "rotation_6d": 6}
A = 4
TIMELINE = TimelineConfig(blocks=2, latents_per_block=1, actions_per_block=A, frame_stride=1)


def robot(state: list[dict[str, Any]], action: list[dict[str, Any]]) -> EmbodimentConfig:
    sized = [sum(SIZES.get(g.get("network_rotation") or g.get("rotation", ""), g["size"]) for g in groups) for groups in (state, action)]
    return from_dict(EmbodimentConfig, {"name": "arm", "state_dim": sized[0], "action_dim": sized[1], "state_groups": state, "action_groups": action})


def turns(seed: int, *shape: int) -> np.ndarray:
    """Rotations (..., 3, 3) in all directions."""
    return to_matrix(np.random.default_rng(seed).normal(size=(*shape, 4)), "quaternion")


# ------------------------------------------------------------------------------------------------ rotations


@pytest.mark.parametrize("form", SIZES)
def test_every_form_of_a_rotation_is_the_same_rotation(form: str) -> None:
    matrices = np.concatenate([turns(0, 200), np.eye(3)[None], to_matrix(np.array([[0.2, np.pi / 2, 0.4], [np.pi, 0, 0], [0, 0, 1e-12]]), "euler")])
    written = from_matrix(matrices, form)
    assert written.shape == (204, SIZES[form])
    np.testing.assert_allclose(to_matrix(written, form), matrices, atol=1e-9)
    np.testing.assert_allclose(convert(written, form, form), written, atol=1e-9)


def test_forms_agree_with_what_they_say() -> None:
    quarter = np.array([0, 0, np.sqrt(0.5), np.sqrt(0.5)])  # a quarter turn about z: x to y
    matrix = to_matrix(quarter, "quaternion")
    np.testing.assert_allclose(matrix @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(from_matrix(matrix, "quaternion_wxyz"), quarter[[3, 0, 1, 2]], atol=1e-12)
    np.testing.assert_allclose(from_matrix(matrix, "euler"), [0, 0, np.pi / 2], atol=1e-12)
    np.testing.assert_allclose(from_matrix(matrix, "axis_angle"), [0, 0, np.pi / 2], atol=1e-12)
    np.testing.assert_allclose(from_matrix(matrix, "rotation_6d"), [0, -1, 0, 1, 0, 0], atol=1e-12)
    x, y, z = (to_matrix(np.eye(3)[i] * angle, "axis_angle") for i, angle in enumerate((0.3, -0.8, 1.1)))
    np.testing.assert_allclose(to_matrix(np.array([0.3, -0.8, 1.1]), "euler"), z @ y @ x, atol=1e-12)


def test_a_quaternion_has_one_sign_and_a_length() -> None:
    path = np.stack([from_matrix(to_matrix(np.array([0.0, 0.0, a]), "axis_angle"), "quaternion") for a in np.linspace(-3, 3, 100)])
    assert np.abs(np.diff(path, axis=0)).max() < 0.05, "no jumps along a turn"
    np.testing.assert_allclose(convert(-path, "quaternion", "quaternion"), path, atol=1e-12)
    np.testing.assert_allclose(convert(3 * path, "quaternion", "quaternion"), path, atol=1e-12)
    for broken in (np.zeros(4), np.array([np.nan, 0, 0, 1])):
        with pytest.raises(ValueError, match="it is no rotation; check the column, its slice"):
            to_matrix(broken, "quaternion")
    with pytest.raises(ValueError, match=r"euler has 3 numbers, so expected \(..., 3\)"):
        to_matrix(np.zeros(4), "euler")


# ------------------------------------------------------------------------------------------------ there and back


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([*SIZES]), st.sampled_from([*SIZES]), st.sampled_from([*SIZES]), st.booleans(),
    st.sampled_from(["quantile", "mean_std", "min_max", "none"]), st.integers(0, 99),
)  # fmt: skip
def test_raw_to_network_to_raw(raw: str, seen: str, state: str, relative: bool, method: str, seed: int) -> None:
    """Any rotation, position and gripper of two rows of actions come back as they were, through normalisation too."""
    rng = np.random.default_rng(seed)
    to = {"relative_to": "hand"} if relative else {}
    arm = robot(
        [{"name": "place", "size": 3}, {"name": "hand", "size": SIZES[state], "rotation": state}],
        [
            {"name": "place", "size": 3, **({"relative_to": "place"} if relative else {})},
            {"name": "hand", "size": SIZES[raw], "rotation": raw, "network_rotation": seen, "normalization": method, **to},
            {"name": "grip", "size": 1, "gripper": True},
        ],
    )
    units = Units.of(arm, DataConfig())
    origin = np.concatenate([rng.normal(size=(2, 3)), from_matrix(turns(seed, 2), state)], axis=-1).astype(np.float32)
    hands = turns(seed + 1, 2, A)
    actions = np.concatenate([rng.normal(size=(2, A, 3)), from_matrix(hands, raw), rng.uniform(size=(2, A, 1))], axis=-1).astype(np.float32)
    encoded = units.encode_actions(actions, origin)
    assert encoded.shape == (2, A, units.action_dim) and encoded.dtype == np.float32
    rows = {"state": np.repeat(origin, A, 0), "action": actions.reshape(2 * A, -1), "executed": actions.reshape(2 * A, -1)}
    normalizer = units.fit([rows], TIMELINE)
    normalizer = dataclasses.replace(normalizer, clip=None, keys={k: dataclasses.replace(s, methods=(), clips=()) for k, s in normalizer.keys.items()})
    back = units.decode_actions(normalizer.unnormalize("action", normalizer.normalize("action", encoded)), origin)
    np.testing.assert_allclose(back[..., :3], actions[..., :3], atol=1e-4)
    np.testing.assert_allclose(to_matrix(back[..., 3:-1], raw), hands, atol=2e-3)
    np.testing.assert_allclose(back[..., -1:], actions[..., -1:], atol=1e-5)


def test_relative_rotations_are_composed_and_padding_is_no_motion() -> None:
    arm = robot(
        [{"name": "hand", "size": 4, "rotation": "quaternion"}],
        [{"name": "hand", "size": 3, "rotation": "euler", "network_rotation": "axis_angle", "relative_to": "hand"}, {"name": "grip", "size": 1}],
    )
    units, at, by = Units.of(arm, DataConfig()), turns(0, 1), to_matrix(np.array([0.0, 0.0, 0.5]), "axis_angle")
    actions = np.concatenate([from_matrix(np.broadcast_to(at @ by, (A, 3, 3)), "euler"), np.arange(A)[:, None]], axis=-1)[None]
    pad = np.arange(A)[None] >= 2
    encoded = units.encode_actions(actions, from_matrix(at, "quaternion"), pad)
    np.testing.assert_allclose(encoded[0, :, :3], np.where(pad[0, :, None], 0, [0, 0, 0.5]), atol=1e-9)
    np.testing.assert_allclose(encoded[0, :, 3], np.arange(A), atol=1e-12)
    with pytest.raises(ValueError, match="relative to the state at the block's start, which was not observed"):
        units.encode_actions(actions)


def test_whole_columns_pass_through_and_the_old_form_of_relative_is_the_new() -> None:
    rng = np.random.default_rng(0)
    state, actions = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(3, A, 4)).astype(np.float32)
    plain = Units.of(EmbodimentConfig("arm", 4, 4), DataConfig())
    np.testing.assert_array_equal(plain.encode_state(state), state)
    np.testing.assert_array_equal(plain.encode_actions(actions), actions)
    old = Units.of(EmbodimentConfig("arm", 4, 4, relative_to=(0, 1, 2, -1)), DataConfig())
    joints = {"size": 3, "name": "joints"}
    grip = {"name": "grip", "size": 1, "gripper": True}
    new = Units.of(robot([joints, grip], [{**joints, "relative_to": "joints"}, grip]), DataConfig())
    pad = rng.uniform(size=(3, A)) < 0.3
    np.testing.assert_array_equal(old.encode_actions(actions, state, pad), new.encode_actions(actions, state, pad))
    np.testing.assert_array_equal(old.decode_actions(actions, state), new.decode_actions(actions, state))
    np.testing.assert_array_equal(old.encode_actions(actions, state, pad)[~pad][:, :3], (actions - state[:, None])[~pad][:, :3])


def test_no_motion_is_what_staying_is_encoded_as() -> None:
    hand = {"name": "hand", "size": 4, "rotation": "quaternion"}
    moved = [{"name": "place", "size": 3, "relative_to": "place"}, {"name": "grip", "size": 1}, {**hand, "network_rotation": "rotation_6d", "relative_to": "hand"}]
    units = Units.of(robot([{"name": "place", "size": 3}, hand], moved), DataConfig())
    state = np.concatenate([[1.0, 2, 3], from_matrix(turns(3), "quaternion")])
    stays = units.encode_actions(np.concatenate([state[:3], [0.4], state[3:]])[None], state)[0]
    still = units.no_motion()
    assert np.isnan(still).tolist() == [False] * 3 + [True] + [False] * 6
    np.testing.assert_allclose(np.where(np.isnan(still), 0.4, still), stays, atol=1e-7)
    assert np.isnan(Units.of(EmbodimentConfig("arm", 4, 4), DataConfig()).no_motion()).all()


# ------------------------------------------------------------------------------------------------ statistics


def test_statistics_of_relative_actions_are_over_every_row_and_offset() -> None:
    rng = np.random.default_rng(0)
    joints = {"name": "joints", "size": 2}
    units = Units.of(robot([joints], [{**joints, "relative_to": "joints"}, {"name": "grip", "size": 1, "normalization": "mean_std"}]), DataConfig())
    episodes = [{"state": rng.normal(size=(n, 2)).astype(np.float32), "action": rng.normal(size=(n, 3)).astype(np.float32)} for n in (3, 30, 17)]
    normalizer = units.fit(episodes, TIMELINE)
    pairs = np.array([e["action"][t + o, :2] - e["state"][t] for e in episodes for t in range(len(e["state"])) for o in range(A) if t + o < len(e["state"])])
    low, high = np.quantile(pairs.astype(np.float64), (0.01, 0.99), axis=0)
    stats = normalizer.keys["action"]
    np.testing.assert_allclose(stats.center[:2], (low + high) / 2, rtol=1e-12)
    np.testing.assert_allclose(stats.scale[:2], (high - low) / 2, rtol=1e-12)
    grips = np.concatenate([e["action"][:, 2] for e in episodes]).astype(np.float64)
    np.testing.assert_allclose([stats.center[2], stats.scale[2]], [grips.mean(), grips.std()], rtol=1e-12)
    assert stats.methods == ("quantile", "quantile", "mean_std") and stats.clips == (1.5, 1.5, None)
    assert normalizer.normalize("action", np.array([1e6, -1e6, 1e6])).tolist()[:2] == [1.5, -1.5]
    assert normalizer.normalize("action", np.array([0, 0, 1e6]))[2] > 1e5, "mean and deviation clip nothing"
    assert normalizer_for(by_embodiment({"arm": normalizer, "other": normalizer}), "arm") == normalizer
    assert normalizer_for(normalizer.to_dict(), "whoever") == normalizer, "statistics of old checkpoints are the only robot's"
    with pytest.raises(ValueError, match="no normalisation statistics for the robot 'leg'; there are those of arm"):
        normalizer_for(by_embodiment({"arm": normalizer}), "leg")


# ------------------------------------------------------------------------------------------------ a dataset's columns


def test_groups_are_slices_and_names_of_a_dataset(tmp_path) -> None:
    dataset = LeRobotDataset(write_dataset(tmp_path / "data", (12, 10)))
    state = [{"name": "grip", "size": 1, "start": 3}, {"name": "arm", "size": 3}]
    action = [{"name": "arm", "size": 3, "relative_to": "arm"}, {"name": "grip", "size": 1, "column": "action.executed", "start": 3}]
    data = DataConfig(executed_action="action.executed")
    units = Units.of(robot(state, action), data)
    units.check(dataset)
    rows, raw = units.rows(dataset, 1), {key: dataset.read(1, key) for key in ("observation.state", "action", "action.executed")}
    np.testing.assert_array_equal(rows["state"], raw["observation.state"][:, [3, 0, 1, 2]])
    np.testing.assert_array_equal(rows["action"], np.concatenate([raw["action"][:, :3], raw["action.executed"][:, 3:]], axis=1))
    np.testing.assert_array_equal(rows["executed"], raw["action.executed"])
    for groups, message in (
        ([{"name": "arm", "size": 3, "start": 2}], "'action' has 4 dimensions, but action group 'arm' of 'arm' is 2..4 of it"),
        ([{"name": "arm", "size": 3, "column": "actoin"}], "no feature 'actoin'; did you mean 'action'?"),
    ):
        with pytest.raises(DatasetError, match=message):
            Units.of(robot(state, groups), data).check(dataset)
    with pytest.raises(DatasetError, match=r"'action' has 4 dimensions, but model\.embodiments gives 'arm' action_dim 7"):
        Units.of(EmbodimentConfig("arm", 4, 7), data).check(dataset)


def test_actions_that_are_recorded_relative_are_not_made_relative_again(tmp_path) -> None:
    whole = write_dataset(tmp_path / "v3", (12,))
    dataset = LeRobotDataset(write_flavour(whole, tmp_path / "named", "v3.0", modality=True))  # action.whole is recorded relative, action.done is not
    state = [{"name": "all", "size": 4, "column": "state.whole"}]
    Units.of(robot(state, [{"name": "all", "size": 4, "column": "action.done", "relative_to": "all"}]), DataConfig()).check(dataset)
    with pytest.raises(DatasetError, match="recorded relative already"):
        Units.of(robot(state, [{"name": "all", "size": 4, "column": "action.whole", "relative_to": "all"}]), DataConfig()).check(dataset)


@pytest.mark.parametrize(
    "state, action, message",
    [
        ([{"name": "a", "size": 3}], [{"name": "b", "size": 2, "relative_to": "a"}], "has 3 numbers, not 2"),
        ([{"name": "a", "size": 3}], [{"name": "b", "size": 3, "relative_to": "c"}], "none of its state groups; name one of a"),
        ([{"name": "a", "size": 3}], [{"name": "b", "size": 3, "rotation": "euler", "relative_to": "a"}], "one is a rotation and one is not"),
        ([{"name": "a", "size": 3}], [{"name": "b", "size": 4, "rotation": "euler"}], "a rotation as euler has 3 numbers"),
        ([{"name": "a", "size": 3}], [{"name": "b", "size": 4, "rotation": "quaternion", "gripper": True}], "is a gripper and a rotation"),
        ([{"name": "a", "size": 3}, {"name": "a", "size": 1}], [{"name": "b", "size": 2}], "name each once"),
        ([{"name": "a", "size": 3}], [{"name": "b", "size": 3, "network_rotation": "rotation_6d"}], "but rotation is 'none'"),
        ([{"name": "a", "size": 3, "relative_to": "a"}], [{"name": "b", "size": 2}], "only actions are relative"),
    ],
)
def test_groups_that_make_no_sense_are_refused(state: list[dict[str, Any]], action: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        robot(state, action)


def test_sizes_must_add_up() -> None:
    with pytest.raises(ConfigError, match=r"action_dim of 'arm' is 4, but its groups add up to hand 6 \+ grip 1 = 7; set action_dim to 7"):
        from_dict(EmbodimentConfig, {"name": "arm", "action_groups": [{"name": "hand", "size": 4, "rotation": "quaternion", "network_rotation": "rotation_6d"}, {"name": "grip", "size": 1}]})
