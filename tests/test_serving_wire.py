"""Bytes on the wire: golden frames of both dialects, and refusals of what is no message, or too much of one."""

import struct

import msgpack
import numpy as np
import pytest
from serving_tools import policy
from tiny import tiny_codec, tiny_config, tiny_model

from wam.data.normalize import Normalizer
from wam.pretrained import Policy
from wam.serving.contract import Contract
from wam.serving.errors import CODES, ServingError
from wam.serving.messages import RESET_DONE, done_reply, error_reply, parse, plan_reply
from wam.serving.wire import DEFAULT_LIMITS, Limits, pack, unpack

# An array as openpi's packer writes it, byte by byte: a map of four whose keys are bytes.
ARRAY = b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x18" + struct.pack("<6f", *range(6)) + b"\xc4\x05dtype\xa3<f4\xc4\x05shape\x92\x02\x03"
SCALAR = b"\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data\xcb" + struct.pack(">d", 1.5) + b"\xc4\x05dtype\xa3<f4"
IMAGE = b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x0c" + bytes(range(12)) + b"\xc4\x05dtype\xa3|u1\xc4\x05shape\x93\x02\x02\x03"
# A RoboArena request as its client packs it, and the reply: the actions alone.
ROBOARENA = b"\x84\xb8observation/image_corner" + IMAGE + b"\xb1observation/state" + ARRAY + b"\xa6prompt\xa4open\xa8endpoint\xa5infer"


def _refused(data: bytes, limits: Limits = DEFAULT_LIMITS) -> str:
    with pytest.raises(ServingError) as error:
        unpack(data, limits)
    assert error.value.code in CODES and error.value.remedy
    return error.value.code


def test_golden_frames() -> None:
    six = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert pack(six) == ARRAY and pack(np.float32(1.5)) == SCALAR
    assert plan_reply("roboarena", {"actions": six, "plan": {}}) == ARRAY
    assert plan_reply("openpi", {"actions": six}) == b"\x81\xa7actions" + ARRAY
    assert done_reply("roboarena", {}) == RESET_DONE == "reset successful"
    message = unpack(ROBOARENA)
    assert list(message) == ["observation/image_corner", "observation/state", "prompt", "endpoint"] and message["endpoint"] == "infer"
    assert np.array_equal(message["observation/image_corner"].ravel(), range(12)) and np.array_equal(message["observation/state"], six)
    assert unpack(SCALAR) == 1.5 and pack(message) == ROBOARENA


def test_errors_in_each_dialect() -> None:
    error = ServingError("missing_key", "the prompt is missing", "send one")
    text = '{"error": {"code": "missing_key", "message": "the prompt is missing", "remedy": "send one", "retry": false}}'
    assert error_reply("openpi", error) == error_reply("roboarena", error) == text
    assert unpack(error_reply("wam", error, 7)) == {"error": error.to_dict(), "request_id": 7}


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<f2", "|u1", "|b1", "<i8", ">i4", ">f4"])
def test_arrays_there_and_back(dtype: str) -> None:
    array = (np.random.default_rng(0).normal(size=(3, 1, 4)) * 9).astype(dtype)
    back = unpack(pack({"x": array}))["x"]
    assert np.array_equal(back, array) and back.dtype.isnative and back.dtype == array.dtype.newbyteorder("=")
    assert unpack(pack(np.zeros((0, 8), np.float32))).shape == (0, 8) and unpack(pack(np.array(2.0, np.float32))).shape == ()


def _array(data: object = b"\0" * 4, dtype: object = "<f4", shape: object = (1,), **more: object) -> bytes:
    return msgpack.packb({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape, **more})


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "bad_message"),
        (b"\xc1", "bad_message"),
        (pack({"a": 1})[:-1], "bad_message"),
        (pack(1) + pack(2), "bad_message"),
        (b"\x91" * 5000 + b"\xc0", "bad_message"),
        (b"\x91" * 20 + b"\xc0", "too_large"),
        (msgpack.packb([[]] * 600), "too_large"),
        (b"\xdd\xff\xff\xff\xff", "bad_message"),  # a list of four thousand million entries, none of which came
        (b"\xc6\xff\xff\xff\xff", "bad_message"),
        (msgpack.packb({1: 2}), "bad_message"),
        (msgpack.packb({b"prompt": "x"}), "bad_message"),
        (b"\x82\xa1a\x01\xa1a\x02", "bad_message"),
        (msgpack.packb({"a": b"bytes"}), "bad_message"),
        (msgpack.packb(msgpack.ExtType(5, b"x")), "bad_message"),
        (msgpack.packb(msgpack.Timestamp(1)), "bad_message"),
        (b"\xa2\xff\xff", "bad_message"),
        (_array(shape=(1 << 60,)), "too_large"),
        (_array(shape=(1 << 20, 1 << 20, 1 << 20)), "wrong_shape"),
        (_array(shape=(-1,)), "too_large"),
        (_array(shape=(True,)), "too_large"),
        (_array(shape=(1.0,)), "too_large"),
        (_array(shape=(1,) * 9), "too_large"),
        (_array(shape=(2,)), "wrong_shape"),
        (_array(b"", shape=()), "wrong_shape"),
        (_array(dtype="O"), "wrong_type"),
        (_array(dtype="<U1"), "wrong_type"),
        (_array(dtype="<c8"), "wrong_type"),
        (_array(dtype="<f4,<f4"), "wrong_type"),
        (_array(dtype="<f3"), "wrong_type"),
        (_array(dtype=["<f4"]), "wrong_type"),
        (_array(data="text"), "bad_message"),
        (_array(extra=1), "bad_message"),
        (msgpack.packb({b"__npgeneric__": True, b"data": [1], b"dtype": "<f4"}), "bad_message"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes, code: str) -> None:
    assert _refused(data) == code


def test_limits_hold_at_the_number_they_name() -> None:
    array = np.zeros(100, np.uint8)
    size = len(pack({"a": array}))
    assert unpack(pack({"a": array}), Limits(message_bytes=size, array_bytes=100))["a"].nbytes == 100
    assert _refused(pack({"a": array}), Limits(message_bytes=size - 1)) == "too_large"
    assert _refused(pack({"a": array}), Limits(array_bytes=99)) == "bad_message"
    assert unpack(pack([1] * 8), Limits(items=8)) == [1] * 8 and _refused(pack([1] * 9), Limits(items=8)) == "bad_message"
    assert unpack(pack([[[]]]), Limits(depth=2)) == [[[]]] and _refused(pack([[[[]]]]), Limits(depth=2)) == "too_large"
    for value in (np.array(["a"]), np.zeros(1, complex), np.array([object()]), object()):
        with pytest.raises(TypeError, match="cannot be sent"):
            pack(value)


# ------------------------------------------------------------------------------------------------ what messages mean


def _message(**changed: object) -> dict:
    message = {"observation/corner4": np.zeros((32, 48, 3), np.uint8), "observation/state": np.zeros(4, np.float32), "prompt": "open"}
    return {key: value for key, value in {**message, **changed}.items() if value is not ...}


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"observation/corner4": ...}, "missing_key"),
        ({"observation/state": ...}, "missing_key"),
        ({"observation/corner4": np.zeros((32, 48, 3), np.float32)}, "wrong_type"),
        ({"observation/corner4": np.zeros((32, 48, 4), np.uint8)}, "wrong_shape"),
        ({"observation/corner4": np.zeros((0, 48, 3), np.uint8)}, "wrong_shape"),
        ({"observation/corner4": np.zeros((65, 2, 2, 3), np.uint8)}, "too_large"),
        ({"observation/state": np.zeros(5, np.float32)}, "wrong_shape"),
        ({"observation/state": np.array([0, np.nan, 0, 0], np.float32)}, "not_finite"),
        ({"observation/state": np.array([0, 1e300, 0, 0])}, "not_finite"),
        ({"observation/state": "0 0 0 0"}, "wrong_type"),
        ({"prompt": 3}, "wrong_type"),
        ({"prompt": "  "}, "wrong_type"),
        ({"embodiment": "yam"}, "unknown_embodiment"),
        ({"endpoint": "exec"}, "unknown_endpoint"),
        ({"mode": "forward"}, "unknown_mode"),
        ({"timestamp": float("nan")}, "not_finite"),
        ({"timestamp": "now"}, "wrong_type"),
        ({"deadline_ms": -1}, "bad_value"),
        ({"steps": 10**6}, "bad_value"),
        ({"steps": True}, "wrong_type"),
        ({"session_id": "x" * 200}, "wrong_type"),
        ({"executed": np.zeros((3, 5), np.float32)}, "wrong_shape"),
        ({"committed": np.full((1, 4), np.inf, np.float32)}, "not_finite"),
        ({"committed": np.zeros((9, 4), np.float32)}, "wrong_shape"),
        ({"frame_times": [1.0, 2.0]}, "wrong_shape"),
        ({"observation/corner4": np.zeros((2, 32, 48, 3), np.uint8), "frame_times": [2.0, 1.0]}, "bad_value"),
    ],
)
def test_what_a_policy_cannot_take_is_refused_by_name(changed: dict, code: str) -> None:
    with pytest.raises(ServingError) as error:
        parse(_message(**changed), Contract.of(policy()))
    assert error.value.code == code and error.value.remedy
    parse(_message(), Contract.of(policy()))


def test_pictures_and_states_are_found_under_the_names_clients_use() -> None:
    contract, image = Contract.of(policy()), np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    for key in ("observation.images.corner4", "corner4", "observation/image"):
        assert np.array_equal(parse(_message(**{"observation/corner4": ..., key: image}), contract).frames[0], image)
    assert np.array_equal(parse(_message(**{"observation/corner4": ..., "images": {"corner4": image.transpose(2, 0, 1)}}), contract).frames[0], image)
    mapped = Contract.of(policy(), keys={"corner4": "cam", "state": "q"})
    request = parse(_message(**{"observation/corner4": ..., "observation/state": ..., "cam": image[None], "q": [1, 2, 3, 4.5]}), mapped)
    assert np.array_equal(request.frames[0], image) and np.array_equal(request.state, np.float32([1, 2, 3, 4.5]))
    with pytest.raises(ValueError, match="a client's name was given for 'corner5', which the policy does not take; it takes"):
        Contract.of(policy(), keys={"corner5": "cam"})


def _droid() -> Contract:
    """The contract of a policy for DROID's card: three cameras on a canvas, states by group, joints relative."""
    config = tiny_config("robot=droid", "codec.image_size=[32, 48]")
    robot = config.model.embodiment(config.data.embodiment)
    rng = np.random.default_rng(0)
    normalizer = Normalizer.fit({"state": rng.normal(size=(50, robot.state_dim)), "action": rng.normal(size=(50, robot.action_dim))})
    return Contract.of(Policy(config, tiny_model(config), tiny_codec(config.codec), normalizer.to_dict(), {"control_hz": 15}))


def test_droid_in_the_words_of_both_clients() -> None:
    """RoboArena counts exterior cameras from 0, openpi's client from 1; each lands on its own cell of the canvas."""
    contract = _droid()
    told = contract.metadata()
    assert told["needs_wrist_camera"] and told["n_external_cameras"] == 2 and told["state_groups"] == {"joint_position": 7, "gripper_position": 1}
    views = {name: np.full((180, 320, 3), level, np.uint8) for name, level in (("wrist", 50), ("left", 100), ("right", 200))}
    state = {"observation/joint_position": np.arange(7.0), "observation/gripper_position": np.array([0.5], np.float32), "prompt": "pick it up"}
    for first, second, endpoint in ((0, 1, "infer"), (1, 2, None)):
        images = {"observation/wrist_image_left": views["wrist"], f"observation/exterior_image_{first}_left": views["left"], f"observation/exterior_image_{second}_left": views["right"]}
        request = parse({**state, **images, "endpoint": endpoint}, contract)
        assert request.dialect == ("openpi" if endpoint is None else "roboarena")
        assert np.array_equal(request.state, np.float32([*range(7), 0.5]))
        canvas = request.frames[0]
        assert (canvas[:16] == 50).all() and (canvas[16:, :24] == 100).all() and (canvas[16:, 24:] == 200).all()
    del state["observation/gripper_position"]
    with pytest.raises(ServingError, match="the state is missing: observation/gripper_position"):
        parse({**state, **images}, contract)
