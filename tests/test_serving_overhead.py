"""The server's own cost is measured on the real server, by a client in a process of its own."""

from wam.serving.overhead import CAMERAS, SIZE, measure


def test_what_the_server_costs_is_measured() -> None:
    found = measure(requests=20, warm=3, pause_s=0.0)
    assert found.requests == 20 and found.message_bytes > len(CAMERAS) * SIZE[0] * SIZE[1] * 3
    for times in (found.served_ms, found.within_ms, found.exchange_ms):
        assert 0 < times[0] <= times[1] <= times[2] < 5000
    assert found.within_ms[0] < found.served_ms[0], "the way there and back is longer than the answer"
    assert 0 < found.cpu_ms < 100 and found.to_dict()["p95_ms"] == found.p95_ms
