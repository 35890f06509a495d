"""The server's own cost is measured on the real server, by a client in a process of its own, beside the policy without a server."""

import numpy as np

from wam.serving.overhead import CAMERAS, SIZE, bare, instant_worker, measure, message, pictures
from wam.serving.wire import unpack


def test_what_the_server_costs_is_measured() -> None:
    found = measure(requests=10, warm=3, pause_s=0.0, rounds=2)
    assert found.requests == 20 and found.message_bytes > len(CAMERAS) * SIZE[0] * SIZE[1] * 3
    for times in (found.served_ms, found.within_ms, found.exchange_ms, found.bare_ms):
        assert 0 < times[0] <= times[1] <= times[2] < 5000
    assert found.bare_ms[0] < found.within_ms[0] < found.served_ms[0], "a server does what a policy does and more, and the way there and back is longer"
    told = found.to_dict()
    assert 0 < found.cpu_ms < 100 and told["p95_ms"] == found.within_ms[1] - found.bare_ms[0] < found.within_ms[1]
    assert told["own_cpu_ms"] == found.cpu_ms - found.exchange_cpu_ms - found.bare_cpu_ms


def test_the_bare_policy_sees_what_the_server_shows_its_own() -> None:
    contract = instant_worker().contract
    seen, plan = bare(contract.canvas, pictures())
    assert np.array_equal(seen, contract.frames(unpack(message()))) and plan.actions is not None and plan.actions.shape[1] == contract.horizon
