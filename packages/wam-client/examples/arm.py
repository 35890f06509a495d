"""A control loop for a real arm, to be filled in where it says so; with --dry-run it runs anywhere and sends nothing.

    python examples/arm.py --dry-run                              a fake policy, a fake arm
    python examples/arm.py --dry-run --url ws://gpu-box:8000      your server, a fake arm
    python examples/arm.py --url ws://gpu-box:8000                your arm, once `Arm` is yours

Every control step: look, ask the broker for this moment's action, send it, or hold if there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from wam_client import Observation, PolicyClient, PolicyError, ReplanningBroker
from wam_client.fake import FakePolicy, FakeServer


class Arm:
    """Your robot: replace what these three methods do."""

    def look(self) -> Observation:
        """Pictures by the names the server's metadata gives, and the joints as they are now."""
        raise NotImplementedError("read your cameras and joints here, or use --dry-run")

    def send(self, action: np.ndarray) -> None:
        """Command one control step."""
        raise NotImplementedError("send the action to your controller here, or use --dry-run")

    def hold(self) -> None:
        """Keep still, whatever that is on your robot: for position control, command the present position."""
        raise NotImplementedError("hold your robot here, or use --dry-run")


class DryArm(Arm):
    """No arm: grey pictures, a state of zeros, and a count of what would have been done."""

    def __init__(self, metadata: dict[str, Any]):
        self.metadata, self.sent, self.held = metadata, 0, 0

    def look(self) -> Observation:
        """The same picture for ever."""
        height, width = self.metadata["image_resolution"]
        images = {name: np.full((height, width, 3), 128, np.uint8) for name in self.metadata["cameras"]}
        return Observation(time.monotonic(), images, np.zeros(self.metadata["state_dim"], np.float32))

    def send(self, action: np.ndarray) -> None:
        """Count."""
        self.sent += 1

    def hold(self) -> None:
        """Count."""
        self.held += 1


def drive(client: PolicyClient, arm: Arm, seconds: float) -> str:
    """The loop; returns why it ended."""
    broker, period = ReplanningBroker(client), 1.0 / float(client.metadata["control_hz"])
    due = end = time.monotonic()
    end += seconds
    while time.monotonic() < end:
        action = broker.step(arm.look())
        if action is None:
            arm.hold()
        else:
            arm.send(action)
        if broker.state == "stop":
            return f"stopped: no fresh plan ({broker.error})"
        due = max(due + period, time.monotonic() - period)  # after a hiccup, do not hurry to catch up
        time.sleep(max(0.0, due - time.monotonic()))
    return "finished"


def main() -> None:
    """Parse, connect, drive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="server (default with --dry-run: a fake one)")
    parser.add_argument("--prompt", default="open the drawer", help="instruction")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long (default: 5)")
    parser.add_argument("--api-key-file", help="file with the server's key")
    parser.add_argument("--dry-run", action="store_true", help="no arm: see that everything talks to everything")
    a = parser.parse_args()
    if a.url is None and not a.dry_run:
        parser.error("give --url, or --dry-run")
    with contextlib.ExitStack() as stack:
        url = a.url or stack.enter_context(FakeServer(FakePolicy(delay_s=0.1))).url
        key: str | None = Path(a.api_key_file).read_text().strip() if a.api_key_file else None
        try:
            client = stack.enter_context(PolicyClient(url, a.prompt, api_key=key))
        except PolicyError as error:
            parser.exit(2, f"{error}\n")
        arm = DryArm(client.metadata) if a.dry_run else Arm()
        why = drive(client, arm, a.seconds)
        print("{}{}".format(why, f"; {arm.sent} actions, {arm.held} holds" if isinstance(arm, DryArm) else ""))


if __name__ == "__main__":
    main()
