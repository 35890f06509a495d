"""The robot's side of a wam policy server; see README.md."""

from wam_client.broker import ChunkBroker, ReplanningBroker
from wam_client.client import Observation, Plan, PolicyClient, PolicyError
from wam_client.watchdog import Watchdog

__all__ = ["ChunkBroker", "Observation", "Plan", "PolicyClient", "PolicyError", "ReplanningBroker", "Watchdog"]
__version__ = "0.1.0"
