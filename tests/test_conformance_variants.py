"""Cases of other sizes: a plain reading of the description first reproduces the stored ones, and then says what others come to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from naive_dreamzero import Naive, Size, outputs, shapes
from torch import Tensor

from wam.evaluation.conformance.case import Case, load_case
from wam.evaluation.conformance.compare import compare
from wam.evaluation.conformance.recipe import draw_weight
from wam.evaluation.conformance.run import conformance

CASES = Path(__file__).parent / "conformance"
BASE = Size()
SIZES = {
    "one block of one frame": dataclasses.replace(BASE, batch=1, blocks=1, frames=1, actions=3, head_dim=20),
    "deep and thin": dataclasses.replace(BASE, blocks=3, frames=1, layers=4, heads=3, head_dim=20, i2v=False, ffn=56),
    "long blocks, two states": dataclasses.replace(BASE, batch=1, frames=3, actions=6, states=2, head_dim=28, height=6, width=4),
    "four blocks, two states": dataclasses.replace(BASE, blocks=4, frames=1, actions=2, states=2, heads=1, i2v=False, channels=3),
    "another epsilon": dataclasses.replace(BASE, batch=3, eps=1e-3, head_dim=24),
    "a window of five frames": dataclasses.replace(BASE, blocks=4, window=5),
    "a window of three frames": dataclasses.replace(BASE, batch=1, blocks=4, frames=1, window=3, i2v=False),
}


def size_of(case: Case) -> Size:
    c, a = case.spec["config"], case.spec["axes"]
    sizes = dict(batch=a["B"], blocks=a["N_blocks"], frames=a["nf"], actions=a["na"], states=a["ns"], layers=c["num_layers"], heads=c["num_heads"], head_dim=a["head_dim"])
    sizes |= dict(height=a["H"], width=a["W"], channels=a["C"], window=case.spec["local_attn_size"], ffn=c["ffn_dim"], freq=c["freq_dim"], text=c["text_dim"])
    return Size(**sizes, i2v=c["model_type"] == "i2v", action_dim=c["action_dim"], state_dim=c["max_state_dim"], hidden=c["hidden_size"], clip=case.spec["clip_dim"], eps=c["eps"])


@pytest.mark.parametrize("name", ["dreamzero_a_i2v", "dreamzero_a_ti2v"])
def test_the_plain_reading_is_right(name: str) -> None:
    case = load_case(CASES / f"{name}.json")
    size = size_of(case)
    assert shapes(size) == {key: tuple(weight.shape) for key, weight in case.weights.items()}
    ours = outputs(Naive(size, case.weights, case.inputs), (("full", 16), ("skip", 8)), chunks=2)
    stored = [key for key in case.outputs if not key.startswith("clip1280/")]
    worst = [line for key in stored if not (line := compare(key, case.outputs[key], ours[key], 3e-6)).passed]
    assert len(stored) > 40 and not worst


@pytest.mark.parametrize("name", SIZES)
def test_other_sizes(name: str, tmp_path: Path) -> None:
    size = SIZES[name]
    weights = {key: draw_weight(key, shape, name) for key, shape in shapes(size).items()}
    inputs = draw_inputs(size, torch.Generator().manual_seed(0))
    inside = size.blocks if size.window < 0 else min(size.blocks, (size.window - 1) // size.frames)
    path = write(tmp_path / "case.json", size, weights, inputs, outputs(Naive(size, weights, inputs), (("full", 4), ("skip", 3)), inside, steps=6))
    (result,) = conformance([path])
    assert len(result.lines) > 20 and all(line.passed for line in result.lines)


def test_what_begins_anew_is_refused_and_the_rest_computed(tmp_path: Path) -> None:
    """A plan whose window is full: the release restarts from a frame that no case names."""
    size = dataclasses.replace(BASE, batch=1, blocks=3, frames=1, window=2)
    weights = {key: draw_weight(key, shape) for key, shape in shapes(size).items()}
    inputs = draw_inputs(size, torch.Generator().manual_seed(0))
    numbers = outputs(Naive(size, weights, inputs), (("full", 2),), 2)
    path = write(tmp_path / "case.json", size, weights, inputs, {key: x for key, x in numbers.items() if key.startswith(("train/", "sample/released"))})
    with pytest.raises(RuntimeError, match=r"0 of 1 cases, 10 of 18 outputs"):
        conformance([path])


def draw_inputs(s: Size, generator: torch.Generator) -> dict[str, Tensor]:
    """Standard normal numbers, levels anywhere in 0..1000."""
    frames, steps = 1 + s.blocks * s.frames, s.blocks * s.actions
    video, action = (s.batch, s.channels, frames, s.height, s.width), (s.batch, steps, s.action_dim)
    normal = {"clean_latents": video, "noise_video": video, "noisy_latents": video, "actions": action, "noise_action": action, "noisy_actions": action}
    normal |= {"state": (s.batch, s.blocks * s.states, s.state_dim), "clip_feature": (s.batch, 257, s.clip), "y": (s.batch, 4 + s.channels, *video[2:])}
    normal |= dict.fromkeys(("text_context", "text_context_neg"), (s.batch, 7, s.text))
    normal |= {"sample_noise_video": (s.batch, s.channels, s.frames, s.height, s.width), "sample_noise_action": (s.batch, s.actions, s.action_dim)}
    out = {name: torch.randn(shape, generator=generator) for name, shape in normal.items()}
    out |= {"t_frame": 1000 * torch.rand(s.batch, frames, generator=generator), "t_action": 1000 * torch.rand(s.batch, steps, generator=generator)}
    out |= {"timestep_id_raw": torch.randint(1000, (s.batch, frames), generator=generator).float(), "has_real_action": (torch.arange(s.batch) != 1).float()}
    return out | {"action_mask": (torch.rand(action, generator=generator) > 0.3).float()}


def write(path: Path, s: Size, weights: dict[str, Tensor], inputs: dict[str, Tensor], numbers: dict[str, Tensor]) -> Path:
    """A pair of files in the format of the released cases."""
    parts = {"weights": weights, "inputs": inputs, "outputs": numbers}
    data = safetensors.torch.save({f"{part}/{name}": x.clone() for part, tensors in parts.items() for name, x in tensors.items()})
    config = {"dim": s.dim, "ffn_dim": s.ffn, "freq_dim": s.freq, "text_dim": s.text, "text_len": 7, "num_heads": s.heads, "num_layers": s.layers, "max_chunk_size": s.blocks, "eps": s.eps, "sink_size": 0}
    config |= {"num_frame_per_block": s.frames, "num_action_per_block": s.actions, "num_state_per_block": s.states, "frame_seqlen": s.patches, "model_type": "i2v" if s.i2v else "ti2v"}
    axes = {"B": s.batch, "C": s.channels, "F": 1 + s.blocks * s.frames, "H": s.height, "W": s.width, "N_blocks": s.blocks}
    spec = {"format": "golden-v1", "case": path.stem, "config": config, "axes": axes, "local_attn_size": s.window, "tensor_count": {part: len(x) for part, x in parts.items()}}
    spec |= {part: {name: {"shape": list(x.shape)} for name, x in parts[part].items()} for part in ("inputs", "outputs")}
    path.with_suffix(".safetensors").write_bytes(data)
    path.write_text(json.dumps(spec | {"safetensors_sha256": hashlib.sha256(data).hexdigest()}))
    return path
