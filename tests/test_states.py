"""More than one state a block: allowed where nothing plans, as in DreamZero's training; refused where it would ask for the future."""

import pytest
from tiny import tiny_config, tiny_policy

from wam.config import ConfigError
from wam.inference.session import Session
from wam.timeline import Clock, Kind


def test_states_lie_evenly_over_their_block() -> None:
    timeline = tiny_config("timeline.frame_stride=null", "timeline.actions_per_block=6", "timeline.latents_per_block=3", "timeline.states_per_block=3").timeline
    assert Clock(timeline, (1, 1), "index").segment(Kind.S, 2).positions[:, 3].tolist() == [6, 7, 8]
    states, actions = (Clock(timeline, (1, 1)).segment(kind, 1).positions[:, 0] for kind in (Kind.S, Kind.A))
    assert states.tolist() == [3, 4, 5] and (actions[1::2] - states).tolist() == [1, 1, 1]  # a state is where the two actions after it begin


def test_states_of_the_future_are_refused() -> None:
    with pytest.raises(ConfigError, match="states_per_block is 3, which does not divide actions_per_block 8"):
        tiny_config("timeline.states_per_block=3", "timeline.frame_stride=null")
    with pytest.raises(ConfigError, match="knows only the state at its start"):
        tiny_config("timeline.states_per_block=2")
    policy = tiny_policy(tiny_config("timeline.states_per_block=2", "timeline.frame_stride=null"))
    with pytest.raises(ValueError, match="states_per_block = 2"):
        Session(policy, ["open the drawer"], "metaworld", [0])
