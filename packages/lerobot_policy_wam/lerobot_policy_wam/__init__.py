"""World action models as a policy of LeRobot, which imports this package by its name and so learns of policy type `wam`.

    configuration_wam   WAMConfig: --policy.type=wam, and what it takes          LeRobot finds these three by their names
    modeling_wam        WAMPolicy: select_action, forward, ...
    processor_wam       LeRobot's pipelines around it, which change no number
    names, windows      its batches as `wam` has them                            no LeRobot needed
    robots              the rows of a vectorised environment, a memory each
    folder              a `wam train` checkpoint as a folder for --policy.path

Where LeRobot is not installed, nothing is registered, and asking for the policy says so.
"""

from importlib.util import find_spec
from typing import Any

__version__ = "0.1.0"
__all__ = ["WAMConfig", "WAMPolicy", "make_wam_pre_post_processors"]

if find_spec("lerobot") is not None:
    from lerobot_policy_wam.configuration_wam import WAMConfig
    from lerobot_policy_wam.modeling_wam import WAMPolicy
    from lerobot_policy_wam.processor_wam import make_wam_pre_post_processors


def __getattr__(name: str) -> Any:
    if name in __all__:
        raise ImportError(f"{name} needs LeRobot, which this interpreter does not have: pip install lerobot==0.4.4 (see docs/lerobot.md)")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
