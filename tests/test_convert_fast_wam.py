"""Fast-WAM's checkpoints: every tensor at full size, a small release to a policy folder, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wam.config import load_config
from wam.convert import convert
from wam.convert.fast_wam import KEYS, file_keys, model_config
from wam.convert.options import Options
from wam.convert.policy_folder import network
from wam.convert.report import plan
from wam.data.normalize import Normalizer
from wam.evaluation.conformance.case import load_case
from wam.model.wam import WorldActionModel
from wam.shards import MemorySource, ShardReader, build_empty

CASE = Path(__file__).parent / "conformance" / "fastwam_base.json"
HEAD_DIM = 20


def full_size(robot: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint, as the case describes it."""
    release = load_case(CASE).spec["released_checkpoint"]
    layers = release["full_size_config"]["video"]["num_layers"]
    keys = {**release["mot"]["keys"], **release["mot_task_dependent"][robot]}
    shapes = {name.replace("{N}", str(n)): tuple(shape) for name, shape in keys.items() for n in range(layers if "{N}" in name else 1)}
    return shapes | {f"proprio_encoder.{name}": tuple(shape) for name, shape in release["proprio_encoder"][robot].items()}


@pytest.mark.parametrize("robot", ["libero", "robotwin"])
def test_every_tensor_of_a_full_size_checkpoint_has_its_place(robot: str) -> None:
    shapes, mot = full_size(robot), load_case(CASE).spec["released_checkpoint"]["mot"]
    inside = {name: shape for name, shape in shapes.items() if name.startswith("mixtures.")}
    assert len(inside) == mot["tensors"] == 1649
    assert sum(torch.Size(shape).numel() for shape in inside.values()) == mot[f"parameters_{robot}"]

    config = model_config(shapes, "base")
    assert (config.model.heads, config.model.expert_width, config.data.embodiment, config.timeline.frames) == (24, 1024, robot, 9)
    source = MemorySource({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    fates = plan(source, [network(config, KEYS)], "the checkpoint")  # refuses what is missing, unexpected or of another shape
    assert len(fates) == len(shapes) and not any(fate.fate == "unused" for fate in fates)
    model = build_empty(lambda: WorldActionModel(config))
    assert sum(p.numel() for p in model.parameters()) == sum(torch.Size(shape).numel() for shape in shapes.values())


def release(folder: Path, change: dict[str, Tensor] | None = None) -> Path:
    """The case's weights as the release saves them, with statistics beside."""
    weights = load_case(CASE).weights | (change or {})
    mot = {name: x.bfloat16() for name, x in weights.items() if name.startswith("mixtures.")}
    state = {name.removeprefix("proprio_encoder."): x.bfloat16() for name, x in weights.items() if name.startswith("proprio_encoder.")}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save({"mot": mot, "proprio_encoder": state, "step": 7, "torch_dtype": "torch.bfloat16", "optimizer": optimizer}, folder / "tiny.pt")
    ends = {"state": 4, "action": 5}
    stats = {kind: {"default": {"global_min": [-2.0] * dim, "global_max": [6.0] * dim}} for kind, dim in ends.items()}
    (folder / "tiny_dataset_stats.json").write_text(json.dumps(stats))
    return folder / "tiny.pt"


def test_a_release_becomes_a_policy_folder(tmp_path: Path) -> None:
    src, dst = release(tmp_path), tmp_path / "policy"
    report = convert("fast-wam", src, dst, Options(variant="joint", head_dim=HEAD_DIM, control_hz=10))
    weights = load_case(CASE).weights
    assert report.count(fate="unused") == 1 and report.count() == len(weights) + 1  # the optimiser's state

    config = load_config(dst / "config.yaml")
    assert config.preset == "fast_wam_joint" and set(config.training.modes) == {"joint"}
    written = ShardReader(dst, "model")
    for name, weight in weights.items():
        (target, op), *_ = KEYS.targets(name)
        assert torch.equal(written.get(f"model.{target}"), op.do(weight.bfloat16())), name
    expected = {f"model.{name}" for name in build_empty(lambda: WorldActionModel(config)).state_dict()}
    assert set(written.names()) == expected

    normalizer = Normalizer.from_dict(json.loads((dst / "normalizer.json").read_text()))
    assert normalizer.normalize("action", torch.tensor([-2.0, 2.0, 6.0, 2.0, 2.0])).tolist() == [-1, 0, 1, 0, 0]
    assert json.loads((dst / "config.json").read_text())["control_hz"] == 10


def test_what_is_refused(tmp_path: Path) -> None:
    src = release(tmp_path)
    with pytest.raises(ValueError, match="no variant 'jiont'; expected one of base, joint, idm"):
        convert("fast-wam", src, tmp_path / "out", Options(variant="jiont", head_dim=HEAD_DIM))
    with pytest.raises(ValueError, match="a multiple of the head size 128"):
        convert("fast-wam", src, tmp_path / "out")
    release(tmp_path, {"mixtures.video.blocks.1.ffn.0.weight": torch.zeros(7, 60)})
    with pytest.raises(ValueError, match=r"tensor 'mot.mixtures.video.blocks.1.ffn.0.weight' has shape \[7, 60\]"):
        convert("fast-wam", src, tmp_path / "out", Options(head_dim=HEAD_DIM))
    release(tmp_path, {"mixtures.audio.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unexpected tensor 'mot.mixtures.audio.weight'"):
        convert("fast-wam", src, tmp_path / "out", Options(head_dim=HEAD_DIM))
    torch.save({"dit": {"patch_embedding.weight": torch.zeros(60, 6, 1, 2, 2)}, "step": 1}, src)
    with pytest.raises(ValueError, match="'dit' holds the video expert alone"):
        convert("fast-wam", src, tmp_path / "out", Options(head_dim=HEAD_DIM))
    release(tmp_path)
    (tmp_path / "tiny_dataset_stats.json").write_text(json.dumps({"state": {"default": {"global_min": [0.0], "global_max": [1.0]}}, "action": {}}))
    with pytest.raises(ValueError, match=r"tiny_dataset_stats\.json"):
        convert("fast-wam", src, tmp_path / "out", Options(head_dim=HEAD_DIM))
    assert not (tmp_path / "out").exists()  # nothing half-made


def test_both_maps_read_backwards() -> None:
    for keys, prefix in ((KEYS, ""), (file_keys(), "mot.")):
        for name, weight in load_case(CASE).weights.items():
            released = name if name.startswith("proprio") else prefix + name
            target, tensor = keys.forward(released, weight)
            back, same = keys.backward(target, tensor)
            assert back == released and torch.equal(same, weight)
