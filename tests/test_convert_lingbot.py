"""LingBot-VA's checkpoints: every tensor at full size, a small release to a policy folder, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wam.config import load_config
from wam.convert import convert
from wam.convert.lingbot_va import history, keys, model_config
from wam.convert.options import Options
from wam.convert.policy_folder import network
from wam.convert.report import plan
from wam.evaluation.conformance.case import load_case
from wam.model.wam import WorldActionModel
from wam.shards import MemorySource, ShardReader, build_empty

CASE = Path(__file__).parent / "conformance" / "lingbot.json"


def test_every_tensor_of_the_full_size_checkpoint_has_its_place() -> None:
    release = load_case(CASE).spec["released_checkpoint"]
    layers = release["transformer"]["layers"]["blocks"]
    shapes = {name.replace("{N}", str(n)): tuple(shape) for name, shape in release["transformer"]["keys"].items() for n in range(layers if "{N}" in name else 1)}
    assert len(shapes) == release["transformer"]["tensors"] == 839
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == release["transformer"]["parameters"] == 5_088_872_670

    config = model_config(release["config"])
    source = MemorySource({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    fates = plan(source, [network(config, keys(config.codec.channels, config.model.patch))], "the checkpoint")
    idle = [fate for fate in fates if fate.fate == "unused"]
    assert len(fates) == 839 and len(idle) == 4 and all(".text_embedder." in fate.source for fate in idle)
    used = 5_088_872_670 - sum(torch.Size(fate.shape).numel() for fate in idle)
    assert sum(p.numel() for p in build_empty(lambda: WorldActionModel(config)).parameters()) == used


def release(folder: Path, change: dict[str, Tensor] | None = None, without: str | None = None) -> Path:
    """The case's weights as the release lays them out, frozen parts beside."""
    case = load_case(CASE)
    weights = {name: x for name, x in (case.weights | (change or {})).items() if name != without}
    for part in ("vae", "text_encoder", "tokenizer", "transformer"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(case.spec["config"] if part == "transformer" else {"part": part}))
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder


def test_a_release_becomes_a_policy_folder(tmp_path: Path) -> None:
    src, dst = release(tmp_path / "release"), tmp_path / "policy"
    report = convert("lingbot-va", src, dst)
    weights = load_case(CASE).weights
    assert report.count() == len(weights) and report.count(fate="unused") == 4

    config, written = load_config(dst / "config.yaml"), ShardReader(dst, "model")
    assert config.preset == "lingbot_va" and config.relations.cells == {"Ac->Vc": "<="} and config.codec.pretrained is None
    assert set(written.names()) == {f"model.{name}" for name in build_empty(lambda: WorldActionModel(config)).state_dict()}
    linear, conv = weights["patch_embedding_mlp.weight"], written.get("model.backbone.patch_embedding.weight")
    patch = torch.randn(5, 6, 1, 2, 2)  # a Linear over a flattened patch and a convolution over the patch
    assert torch.allclose(patch.flatten(1) @ linear.T, torch.nn.functional.conv3d(patch, conv).flatten(1), atol=1e-5)
    assert json.loads((dst / "vae" / "config.json").read_text()) == {"part": "vae"}  # copied

    other = tmp_path / "referenced"
    convert("lingbot-va", src, other, Options(components="reference"))
    assert load_config(other / "config.yaml").codec.pretrained == str(src) and not (other / "vae").exists()


def test_what_is_refused(tmp_path: Path) -> None:
    src = release(tmp_path / "a", without="action_proj_out.bias")
    with pytest.raises(ValueError, match=r"tensor 'action_proj_out\.bias' is missing"):
        convert("lingbot-va", src, tmp_path / "out")
    src = release(tmp_path / "b", {"action_embedder.weight": torch.zeros(60, 9)})
    with pytest.raises(ValueError, match=r"tensor 'action_embedder.weight' has shape \[60, 9\]"):
        convert("lingbot-va", src, tmp_path / "out")
    config = src / "transformer" / "config.json"
    config.write_text(json.dumps({"num_layers": 3}))
    with pytest.raises(ValueError, match="lacks num_attention_heads"):
        convert("lingbot-va", src, tmp_path / "out")
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        convert("lingbot-va", src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_segments_that_a_window_leaves_in_view() -> None:
    assert [history(window) for window in (2, 3, 4, 72)] == [1, 1, 3, 71]
