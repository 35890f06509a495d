"""The published ways of joining video and actions, and ours, as the settings that differ from the defaults.

A preset is a partial config.  `preset: NAME` lays it under what a YAML file and the command line say, and the resolved config, cells of
the relation table included, is saved with the weights.  A preset answers what defines a system: who attends to whom, how noise is drawn
and weighted, how tokens sit on the clock, how actions are coupled to the video, how plans are sampled.  Sizes (layers, heads, codec, text,
frames and actions a block) are the backbone's and the robot's, and are not part of it.

Comments say where a form of ours is not the published one; `docs/presets.md` has the sources and the whole comparison.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

Tree = dict[str, Any]

# One observation, one block: nothing of earlier blocks is seen, and the observation is H.
_FORGETS = {"V->Vc": "none", "V->Ac": "none", "A->Vc": "none", "A->Ac": "none", "Vc->Vc": "=", "Vc->Ac": "none", "Ac->Vc": "none", "Ac->Ac": "="}
_FORGETS |= {f"{query}->S": "=" for query in ("V", "A", "Vc", "Ac")}
_ONE_BLOCK = {"blocks": 1, "history": 1}

# DreamZero (arXiv 2602.15922).  History is clean video alone; a block sees its own state and no other; the noisy first frame (V in
# block -1) sees itself.  As released, a cached plan lets the state see everything of its block, which training does not:
# relations.cells {S->H: all, S->Vc: "<", S->V: "=", S->A: "="} reproduces that.
_DREAMZERO: Tree = {
    "timeline": {"blocks": 4, "history": 4},  # it forgets all after four blocks; within them, all is seen
    "model": {
        "positions": "index",
        "action_head": "mlp",
        "state_level": "action",
        "activation": "relu",
        "angles": "float64",
        "embodiment_weights": "shared",
    },
    "relations": {
        "cells": {
            "V->H": "<",
            "V->S": "=",
            "V->Ac": "none",
            "A->S": "=",
            "A->Ac": "none",
            "Vc->S": "none",
            "Vc->Ac": "none",
        }
    },
    "noise": {
        "video": {"shift": 5.0, "at_one": 0.0, "table": 1000, "weighting": "bump"},
        "action": {"shift": 5.0, "table": 1000, "weighting": "bump"},
        "coupled": 1.0,
        "couple_always": True,
        "condition_probability": 0.0,
    },
    "sampling": {"solver": "unipc", "steps": 16, "guidance": 5.0, "untrained_guidance": True, "reuse": "mask", "evaluations": 8},
    "training": {"modes": {"joint_mutual": 1.0}, "predict_first_frame": True, "reduction": "all", "state_dropout": 0.0},
    "rollout": {"modes": ["joint_mutual"]},
}

# DreamZero-Flash: video near pure noise while actions are at any level, drawn per action token (as its code does); few steps, in which
# video stays noisy and actions arrive.  Neither its weights nor its number of steps are released; 4 is ours.
_FLASH: Tree = {
    **_DREAMZERO,
    "noise": {
        "video": {"distribution": "beta", "alpha": 7.0, "beta": 1.0, "shift": 5.0, "at_one": 0.0, "table": 1000, "weighting": "bump"},
        "action": {"shift": 5.0, "table": 1000, "per": "token", "weighting": "bump"},
        "coupled": 0.0,
        "condition_probability": 0.0,
    },
    "sampling": {"solver": "unipc", "steps": 4, "guidance": 5.0, "untrained_guidance": True, "video_final": 0.8},
}


def _fast_wam(mode: str, condition: float = 0.0) -> Tree:
    """Fast-WAM (arXiv 2603.16666): an expert of 1024 beside Wan2.2-5B; actions see the first frame, and in two variants video too."""
    levels = {"shift": 5.0, "per": "sample", "weighting": "bump"}
    return {
        "timeline": _ONE_BLOCK,
        "model": {
            "expert_width": 1024,
            "expert_ffn_dim": 4096,
            "positions": "index",
            "action_embed": "linear",
            "action_head": "linear",
            "action_time": "own",
            "state": "context",
            "angles": "float64",
        },
        "relations": {"cells": _FORGETS},
        "noise": {
            "video": {**levels, "at_one": 0.0},
            "action": levels,
            "coupled": 0.0,
            "condition_probability": condition,  # IDM: the copy that actions see is noised in half of the samples, over the whole schedule
            "condition": levels,
        },
        "sampling": {"steps": 10},
        "training": {"modes": {mode: 1.0}, "reduction": "sample", "frame_padding": "all", "state_dropout": 0.0},
        "rollout": {"modes": [mode]},
    }


# LingBot-VA (arXiv 2601.21998), as released: one shared stack.  Executed actions see the video they led to (`Ac->Vc <=`), which is no leak
# while no video sees actions of its own block.  The first frame is block 0's own; there is no state.  Its training draws windows of 4 to
# 64 segments and blocks of 1 to 4 latent frames at random; ours have one size.
_LINGBOT: Tree = {
    "timeline": {"history": 64, "history_unit": "segment", "first_frame": "inside"},
    "model": {
        "positions": "frame_fraction",
        "action_embed": "linear",
        "action_head": "modulated_linear",
        "action_time": "own",
        "state": "none",
        "embodiment_weights": "shared",
    },
    "relations": {"cells": {"Ac->Vc": "<="}},
    "noise": {
        "video": {"shift": 5.0, "at_one": 0.0, "per": "frame", "table": 1000, "weighting": "bump"},
        "action": {"shift": 1.0, "per": "frame", "table": 1000, "weighting": "bump"},
        "coupled": 0.0,
        "condition_probability": 0.0,
        "history_probability": 0.5,  # the copy is history and condition in one
        "history": {"table": 1000},
    },
    "sampling": {"steps": 25, "action_steps": 50, "guidance": 5.0},
    "training": {"modes": {"imagine": 1.0}, "text_dropout": 0.1, "state_dropout": 0.0},
    "rollout": {"modes": ["imagine"]},
}

# UWM (arXiv 2504.02792): one copy, everything sees everything, and two independent levels make every mode.  It conditions on the observation
# by adaptive normalisation, ours by attention to H; it predicts noise on a squared-cosine schedule of 100 steps, ours velocity on a
# straight path; its learned positions are rotary ones here; its registers are left out.
_UWM: Tree = {
    "timeline": _ONE_BLOCK,
    "model": {"positions": "index", "state": "none"},
    "relations": {"cells": _FORGETS, "copies": "single"},
    "noise": {
        "video": {"shift": 1.0, "at_zero": 0.01, "at_one": 0.01, "per": "sample"},  # each of 100 levels is drawn as often
        "action": {"shift": 1.0, "at_zero": 0.01, "at_one": 0.01, "per": "sample"},
        "coupled": 0.0,
        "condition_probability": 0.0,
    },
    "sampling": {"steps": 10},
    "training": {"modes": {"joint_mutual": 1.0}, "state_dropout": 0.0},
    "rollout": {"modes": ["skip_registers", "joint_mutual"]},
}

# GE-Act (arXiv 2508.05635): an expert of 512 reads what the video network computes once, at pure noise.  It reads by cross-attention to each
# layer's hidden states and meets the text through the video alone; ours shares one attention with the video's keys and sees the text too.
# Its history is four sparse frames that also see the noisy ones; ours are the last four blocks, which do not.
_GE_ACT: Tree = {
    "timeline": {"blocks": 4, "history": 4},
    "model": {"expert_width": 512, "positions": "index", "action_embed": "linear", "action_head": "linear", "action_time": "own"},
    "relations": {"cells": {"V->S": "none", "V->Ac": "none", "A->S": "=", "A->Ac": "none", "Vc->S": "none", "Vc->Ac": "none"}},
    "noise": {"action": {"shift": 1.0, "per": "sample"}, "coupled": 0.0, "condition_probability": 0.0},
    "sampling": {"steps": 10},
    "training": {"modes": {"skip_registers": 1.0}, "state_dropout": 0.0},
    "rollout": {"modes": ["skip_registers"]},
}

# A vision-language-action model in the manner of pi0 (arXiv 2410.24164): no future video at all; an expert of 1024 sees the observation and the
# state; levels are Beta(1.5, 1) over 0.001..1.  Its backbone is a language model; ours is the video network, which sees the first frame.
_VLA: Tree = {
    "timeline": _ONE_BLOCK,
    "model": {"expert_width": 1024, "expert_ffn_dim": 4096, "positions": "index", "action_head": "linear", "action_time": "own"},
    "relations": {"cells": _FORGETS},
    "noise": {
        "action": {"distribution": "beta", "alpha": 1.5, "beta": 1.0, "low": 0.001, "per": "sample"},
        "coupled": 0.0,
        "condition_probability": 0.0,
    },
    "sampling": {"steps": 10},
    "training": {"modes": {"action_only": 1.0}, "video_weight": 0.0, "state_dropout": 0.0},
    "rollout": {"modes": ["action_only"]},
}

PRESETS: dict[str, Tree] = {
    "all": {},  # ours: every mode from one set of weights; the defaults are its settings
    "dreamzero": _DREAMZERO,
    "dreamzero_flash": _FLASH,
    "fast_wam": _fast_wam("skip"),
    "fast_wam_joint": _fast_wam("joint"),
    "fast_wam_idm": _fast_wam("imagine", condition=0.5),
    "lingbot_va": _LINGBOT,
    "uwm": _UWM,
    "ge_act": _GE_ACT,
    "vla": _VLA,
}


def get_preset(name: str) -> Tree:
    """The settings of a preset.

    Raises:
        ValueError: naming the nearest preset.
    """
    if name not in PRESETS:
        near = get_close_matches(str(name), PRESETS, n=1)
        raise ValueError(f"unknown preset {name!r}; {f'did you mean {near[0]!r}? ' if near else ''}presets: {', '.join(PRESETS)}")
    return PRESETS[name]
