"""LeRobot's pipelines around the policy: keys may be renamed, a row may get a batch dimension, tensors are moved; no number changes.

The two normalising steps are there, with IDENTITY, because `lerobot-train` sets their statistics by name.
"""

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

from lerobot_policy_wam.configuration_wam import WAMConfig


def make_wam_pre_post_processors(
    config: WAMConfig, dataset_stats: dict[str, dict[str, Any]] | None = None
) -> tuple[PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]]:
    """What runs before and after the policy.

    Args:
        dataset_stats: not looked at: the policy has statistics of its own.
    """
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device=config.device),
        NormalizerProcessorStep(features={**(config.input_features or {}), **(config.output_features or {})}, norm_map=config.normalization_mapping, stats=None),
    ]
    after = [
        UnnormalizerProcessorStep(features=config.output_features or {}, norm_map=config.normalization_mapping, stats=None),
        DeviceProcessorStep(device="cpu"),
    ]
    return (
        PolicyProcessorPipeline[dict[str, Any], dict[str, Any]](steps=before, name=POLICY_PREPROCESSOR_DEFAULT_NAME),
        PolicyProcessorPipeline[PolicyAction, PolicyAction](
            steps=after, name=POLICY_POSTPROCESSOR_DEFAULT_NAME, to_transition=policy_action_to_transition, to_output=transition_to_policy_action
        ),
    )
