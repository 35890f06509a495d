"""A thousand malformed messages, made from well-formed ones: the server stays up, its memory stays bounded, another robot notices nothing."""

import gc
import logging
import os
import random
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest
from serving_tools import BLOCKS, MODE, Talk, episode, observation, policy, serving
from tiny import TASKS
from websockets.exceptions import ConnectionClosed

from wam.inference.session import Session
from wam.serving.errors import CODES
from wam.serving.wire import Limits, pack

COUNT, GROWTH = 1000, 150 << 20
KEYS = ["prompt", "observation/state", "observation/corner4", "timestamp", "session_id", "mode", "endpoint", "executed", "committed", "commit_steps", "frame_times", "deadline_ms", "steps", "seed", "embodiment", "request_id", "gap", "images", "want", "goal/corner4", "outcome"]


def _value(rng: random.Random, depth: int = 0) -> Any:
    """Something of any type and size."""
    numpy = np.random.default_rng(rng.getrandbits(32))
    simple = [None, True, False, 0, -1, 2**63, -(2**63), 1e308, float("nan"), float("inf"), -0.0, "", "x" * rng.choice([1, 200, 9000]), "\u0000\ud7ff", b"bytes", "plan", "infer", [], {}]
    shape = tuple(rng.choice([0, 1, 2, 3, 4, 7, 32, 48]) for _ in range(rng.randint(0, 6)))
    size = int(np.prod(shape, dtype=np.int64))
    arrays = [
        numpy.normal(size=shape).astype(rng.choice(["<f2", "<f4", "<f8", ">f4"])) if size < 20_000 else np.zeros(3),
        np.zeros(shape, rng.choice([np.uint8, bool, np.int64])) if size < 20_000 else np.zeros((2, 2), np.uint8),
        np.array([np.nan, np.inf, 0, 1], np.float32),
        np.full(4, 1e300),
    ]
    if depth < 3 and rng.random() < 0.3:
        return [_value(rng, depth + 1) for _ in range(rng.randint(0, 4))] if rng.random() < 0.5 else {rng.choice(KEYS): _value(rng, depth + 1) for _ in range(rng.randint(0, 3))}
    return rng.choice([*simple, *arrays])


def _lying_array(rng: random.Random) -> bytes:
    """An array that says something else than it is."""
    parts: dict[Any, Any] = {b"__ndarray__": True, b"data": b"\0" * rng.choice([0, 1, 16, 4096]), b"dtype": "<f4", b"shape": [4]}
    key = rng.choice(list(parts))
    if rng.random() < 0.3:
        del parts[key]
    else:
        parts[key] = rng.choice([None, [], [2**62, 2**62], [-1], [4.0], [4] * 50, "O", "<U9", "<M8[s]", "i4,i4", "<f4" * 9, b"", "x", {}, True, 2**40])
    return bytes(msgpack.packb({"observation/state": parts, "prompt": "go"}))


def _malformed(rng: random.Random, message: dict[str, Any]) -> bytes | str:
    """One message of some kind of wrong."""
    kind = rng.randrange(9)
    message = dict(message)
    if kind <= 2:
        for _ in range(rng.randint(1, 3)):
            message[rng.choice(KEYS)] = _value(rng)
        return bytes(msgpack.packb(_packed(message), strict_types=False))
    if kind == 3:
        data = pack(message)
        return data[: rng.randrange(len(data))]
    if kind == 4:
        flipped = bytearray(pack(message))
        for _ in range(rng.randint(1, 8)):
            flipped[rng.randrange(rng.choice([80, len(flipped)]))] = rng.randrange(256)
        return bytes(flipped)
    if kind == 5:
        return rng.choice([b"\x91", b"\x81\xa1a", b"\xdc\x00\x01"]) * rng.choice([5, 50, 5000]) + b"\xc0"
    if kind == 6:
        return _lying_array(rng)
    if kind == 7:
        return rng.choice([b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\x90" * 1, b"\xdc\xff\xff" + b"\x90" * 65535, rng.randbytes(rng.randrange(1, 300))])
    return bytes(msgpack.packb({rng.choice([b"prompt", b"__ndarray__", b"__npgeneric__", "a"]): _packed(_value(rng))})) if rng.random() < 0.8 else "text"


def _packed(value: Any) -> Any:
    """Arrays as maps, whatever their type."""
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": list(value.shape)}
    if isinstance(value, dict):
        return {key: _packed(inner) for key, inner in value.items()}
    return [_packed(inner) for inner in value] if isinstance(value, list) else value if not (isinstance(value, int) and value >= 2**64) else 0


def test_a_thousand_malformed_messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "wam.serving")
    session, expected = Session(policy(), TASKS[:1], "metaworld", [100]), []
    for block in range(BLOCKS):
        if block:
            session.commit(expected[-1][None])
        session.observe(*episode(0).at(block))
        expected.append(session.plan(MODE).actions[0])
    rng, process = random.Random(7), psutil.Process(os.getpid())
    told: dict[str, int] = {}
    with serving(rate=1e6, burst=10**6, max_sessions=8, spare_s=0.0, limits=Limits(message_bytes=1 << 20, array_bytes=1 << 20)) as running, Talk(running.url) as good:
        bad = Talk(running.url)
        gc.collect()
        before = process.memory_info().rss
        for i in range(COUNT):
            if i % (COUNT // BLOCKS) == 0:
                block = i // (COUNT // BLOCKS)
                reply = good.ask(observation(0, block, session_id="good", deadline_ms=20_000))
                np.testing.assert_allclose(reply["actions"], expected[block], rtol=1e-3, atol=1e-4)
            try:
                reply = bad.ask(_malformed(rng, observation(1, 0)))
            except ConnectionClosed:
                bad = Talk(running.url)
                continue
            code = reply["error"]["code"] if isinstance(reply, dict) and "error" in reply else "answered"
            assert code == "answered" or code in CODES
            told[code] = told.get(code, 0) + 1
            assert "Traceback" not in str(reply)
        assert process.memory_info().rss - before < GROWTH
        assert len(running.server.store.entries) <= 8
    assert told.get("internal_error", 0) == 0, [r.exc_info for r in caplog.records if r.exc_info][:1]
    assert {"bad_message", "too_large", "wrong_type", "wrong_shape", "not_finite", "missing_key"} <= set(told), told
