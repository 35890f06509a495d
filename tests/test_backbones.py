"""Pretrained backbones: every form to the bit, sizes that differ named field by field, memory held once, experts out of the video's weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny_wan import FORMS, transformer, wan_config, write_pipeline

from wam.config import Config, ConfigError, load_config
from wam.model.backbone import Backbone
from wam.model.expert import Expert
from wam.model.loading import config_of_backbone, expert_from_video, interpolate, load_backbone, local_folder, stored_arguments
from wam.model.wam import WorldActionModel

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {form: write_pipeline(tmp_path_factory.mktemp(form), form) for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_to_the_bit_from_its_shards(folders: dict[str, Path], form: str) -> None:
    assert len(list((folders[form] / "transformer").glob("*.safetensors"))) > 2
    backbone, original = load_backbone(folders[form], wan_config(form)), transformer(form)
    assert type(backbone) is Backbone and backbone.config.in_channels == original.config.in_channels
    found, expected = backbone.state_dict(), original.state_dict()
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    again = WanTransformer3DModel.from_pretrained(_saved(backbone, folders[form] / "again"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def _saved(backbone: Backbone, folder: Path) -> Path:
    backbone.save_pretrained(folder)
    return folder


def test_the_config_that_a_backbone_asks_for_fits_it(folders: dict[str, Path]) -> None:
    for form, folder in folders.items():
        config = wan_config(form)
        for name, value in config_of_backbone(folder / "transformer").items():  # the transformer's own folder does as well
            section, field = name.split(".")
            assert getattr(getattr(config, section), field) == value, name


def test_released_sizes_are_what_the_shipped_configs_say(tmp_path: Path) -> None:
    released = {
        "wan21_14b_droid": dict(num_attention_heads=40, num_layers=40, ffn_dim=13824, in_channels=36, out_channels=16, image_dim=1280, added_kv_proj_dim=5120),
        "wan22_5b_libero": dict(num_attention_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48),
        "wan22_5b_droid": dict(num_attention_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48),
        "wan21_1_3b_metaworld": dict(num_attention_heads=12, num_layers=30, ffn_dim=8960, in_channels=16, out_channels=16),
    }
    for name, arguments in released.items():
        config = load_config(ROOT / "configs" / f"{name}.yaml")
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **arguments}))
        for field, value in config_of_backbone(tmp_path).items():
            section, key = field.split(".")
            found = getattr(getattr(config, section), key)
            assert found == value or (key == "image_dim" and value is None), f"{name}: {field}"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("model.layers=3",), r"model\.layers is 3, found 2; set model\.layers=2"),
        (("model.heads=4", "model.ffn_dim=128"), r"model\.heads is 4, found 2, model\.ffn_dim is 128, found 64; set model\.heads=2 model\.ffn_dim=64"),
        (("codec.channels=5",), r"codec\.channels is 5, found 4"),
        (("text.width=32",), r"text\.width is 32, found 16"),
        (("model.first_frame=concat",), r"model\.first_frame is concat, found token"),
        (("model.patch=[1, 4, 4]",), r"model\.patch is \(1, 4, 4\), found \(1, 2, 2\); set model\.patch=\[1, 2, 2\]"),
    ],
)
def test_another_size_is_named_field_by_field(folders: dict[str, Path], overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        load_backbone(folders["t2v"], wan_config("t2v", None, *overrides))


def test_an_image_branch_cannot_be_left_out_but_can_be_new(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"model\.image_dim is None, found 32; set model\.image_dim=32"):
        load_backbone(folders["i2v"], wan_config("i2v", None, "model.image_dim=null"))
    backbone = load_backbone(folders["ti2v"], wan_config("ti2v", None, "model.image_dim=32"))
    assert not any(p.is_meta for p in backbone.parameters()) and backbone.config.image_dim == 32
    video, text, image = torch.randn(1, 6, 3, 4, 4), torch.randn(1, 512, 16), torch.randn(1, 257, 32)  # diffusers parts text and image at 512
    with torch.no_grad():
        plain = transformer("ti2v")(video, torch.tensor([500.0]), text).sample
        seen = WanTransformer3DModel.forward(_plain_blocks(backbone), video, torch.tensor([500.0]), text, image).sample
    torch.testing.assert_close(seen, plain, atol=1e-5, rtol=0)  # silent at first


def _plain_blocks(backbone: Backbone) -> WanTransformer3DModel:
    model = WanTransformer3DModel(**{k: v for k, v in backbone.config.items() if not k.startswith("_")})
    model.load_state_dict(backbone.state_dict())
    return model


def test_bfloat16_is_kept_or_made(folders: dict[str, Path], tmp_path: Path) -> None:
    transformer("t2v").to(torch.bfloat16).save_pretrained(tmp_path)
    stored = load_backbone(tmp_path, wan_config("t2v"))
    made = load_backbone(folders["t2v"], wan_config("t2v"), dtype=torch.bfloat16)
    assert {p.dtype for p in (*stored.parameters(), *made.parameters())} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(stored.parameters(), made.parameters(), strict=True))


def test_what_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanVACETransformer3DModel"}))
    with pytest.raises(ValueError, match="describes a WanVACETransformer3DModel; expected a WanTransformer3DModel"):
        stored_arguments(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", "pos_embed_seq_len": 514}))
    with pytest.raises(ValueError, match="pos_embed_seq_len is 514; a world action model needs None"):
        stored_arguments(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        stored_arguments(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder /nowhere/at/all"):
        local_folder("/nowhere/at/all")
    with pytest.raises(FileNotFoundError, match=r"holds no transformer/config\.json"):
        load_backbone(tmp_path.parent, wan_config("t2v"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", _no_network)
    with pytest.raises(FileNotFoundError, match=r"some/model is no folder here, and cannot be had from the Hub \(ConnectionError: no route\); check the name and the network"):
        local_folder("some/model", "transformer")


def _no_network(repository: str, allow_patterns: list[str]) -> str:
    assert repository == "some/model" and allow_patterns == ["transformer/*"]
    raise ConnectionError("no route")


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path, "t2v") / "transformer"
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"{shard.name} is cut short: expected [\d,]+ bytes, found [\d,]+"):
        load_backbone(tmp_path, wan_config("t2v"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
        load_backbone(tmp_path, wan_config("t2v"))
    shard.write_bytes(whole)
    next(folder.glob("*.index.json")).unlink()
    with pytest.raises(FileNotFoundError, match="index"):
        load_backbone(tmp_path, wan_config("t2v"))


MEASURE = """
import resource, sys
import torch
from wam.config import load_config
from wam.model.loading import load_backbone
from wam.model.wam import WorldActionModel
config = load_config(None, sys.argv[2:])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
backbone = load_backbone(sys.argv[1], config, dtype=torch.bfloat16)
print(peak() - before, sum(p.numel() * p.element_size() for p in backbone.parameters()))
"""


def test_memory_never_holds_two_copies(tmp_path: Path) -> None:
    """A backbone of 240 MB in eight shards, measured from outside by the process's peak."""
    sizes = dict(num_attention_heads=8, attention_head_dim=128, ffn_dim=4096, num_layers=6, freq_dim=256, text_dim=512)
    with torch.no_grad():
        WanTransformer3DModel(**{**FORMS["t2v"], **sizes}).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="32MB")
    fields = config_of_backbone(tmp_path)
    overrides = [f"{name}={list(value) if isinstance(value, tuple) else 'null' if value is None else value}" for name, value in fields.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path), *overrides], capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    grown, weights = map(int, done.stdout.split())
    assert weights > 200e6 and grown < 1.3 * weights, f"memory grew by {grown / weights:.2f} times the weights' {weights / 1e6:.0f} MB"


# ------------------------------------------------------------------------------------------------ experts


def test_an_expert_as_wide_as_the_video_is_the_video() -> None:
    backbone = Backbone(**FORMS["t2v"])
    expert = Expert(backbone.width, 64, backbone)
    expert_from_video(backbone, expert)
    video = dict(backbone.named_parameters())
    assert all(torch.equal(p, video[name]) for name, p in expert.named_parameters())


def test_a_narrow_expert_interpolates_the_video() -> None:
    backbone = Backbone(**FORMS["t2v"])
    expert = Expert(24, 32, backbone)
    expert_from_video(backbone, expert)
    video, own = dict(backbone.named_parameters()), dict(expert.named_parameters())
    q, o = "blocks.1.attn1.to_q.weight", "blocks.1.attn1.to_out.0.weight"
    torch.testing.assert_close(own[q], interpolate(video[q], 1, 24) * 2**0.5)  # sums over half as many inputs
    torch.testing.assert_close(own[o], interpolate(video[o], 0, 24))  # sums over as many as before
    assert torch.equal(own["blocks.0.attn1.norm_q.weight"], video["blocks.0.attn1.norm_q.weight"])
    w = "condition_embedder.time_proj.weight"
    part = interpolate(interpolate(video[w].view(6, 48, 48)[4], 0, 24), 1, 24) * 2**0.5
    torch.testing.assert_close(own[w].view(6, 24, 24)[4], part)  # six signals side by side, not one
    assert own["blocks.0.scale_shift_table"].shape == (1, 6, 24)


def test_interpolation_keeps_both_ends_and_straight_lines() -> None:
    line = torch.linspace(-2, 3, 9).expand(4, 9)
    torch.testing.assert_close(interpolate(line, 1, 5), torch.linspace(-2, 3, 5).expand(4, 5))
    torch.testing.assert_close(interpolate(line.T, 0, 13), torch.linspace(-2, 3, 13)[:, None].expand(13, 4))
    assert interpolate(line, 0, 4) is line
    square = torch.randn(6, 10)
    expected = torch.nn.functional.interpolate(square[None], size=7, mode="linear", align_corners=True)[0]
    torch.testing.assert_close(interpolate(square, 1, 7), expected)


def test_config_refuses_a_patch_that_does_not_tile() -> None:
    with pytest.raises(ConfigError, match="multiple of 32"):
        wan_config("ti2v", None, "codec.image_size=[48, 64]")


# ------------------------------------------------------------------------------------------------ released sizes


def _linear(inside: int, outside: int) -> int:
    return inside * outside + outside


def _blocks(config: Config, width: int, ffn: int) -> int:
    """Parameters of all blocks whose tokens are `width` wide, with attention as wide as the video's."""
    wide = config.model.width
    attention = 3 * _linear(width, wide) + _linear(wide, width) + 2 * wide
    return config.model.layers * (2 * attention + 2 * width + _linear(width, ffn) + _linear(ffn, width) + 6 * width)


def _embedders(config: Config, width: int) -> int:
    time = _linear(config.model.freq_dim, width) + _linear(width, width) + _linear(width, 6 * width)
    return time + _linear(config.text.width, width) + _linear(width, width)


def _arithmetic(config: Config) -> int:
    """Parameters of the whole network, counted on paper."""
    m, channels = config.model, config.codec.channels
    d, e, patch = m.width, m.token_width, m.patch[1] * m.patch[2]
    total = _blocks(config, d, m.ffn_dim) + _embedders(config, d) + 2 * d
    total += _linear(patch * (2 * channels + 4 if m.first_frame == "concat" else channels), d) + _linear(d, patch * channels)
    if m.image_dim:
        total += 2 * m.image_dim + _linear(m.image_dim, m.image_dim) + _linear(m.image_dim, d) + 2 * d + m.layers * (2 * _linear(d, d) + d)
    if m.expert_width:
        total += _blocks(config, e, m.expert_ffn_dim or 4 * e) + _embedders(config, e)
    hidden = m.mlp_hidden or e
    total += _linear(m.actions, e) + (_linear(2 * e, e) + _linear(e, e) if m.action_embed == "level_mlp" else 0)
    total += _linear(m.states, config.text.width) if m.state == "context" else _linear(m.states, hidden) + _linear(hidden, e)
    head = {"linear": _linear(e, m.actions), "mlp": _linear(e, hidden) + _linear(hidden, m.actions)}
    return total + {**head, "modulated_mlp": head["mlp"] + 2 * e}[m.action_head]


@pytest.mark.parametrize(
    ("name", "tokens", "published"),
    [
        ("wan21_14b_droid", 880, 16_484_292_448),
        ("wan22_5b_droid", 50, 5_606_692_832),
        ("wan22_5b_libero", 98, None),
        ("wan21_1_3b_metaworld", 256, None),
    ],
)
def test_released_sizes_build_without_memory_and_count_as_published(name: str, tokens: int, published: int | None) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    with torch.device("meta"):
        model = WorldActionModel(config)
    count = sum(p.numel() for p in model.parameters())
    assert count == _arithmetic(config) and published in (None, count) and model.clock.patches == tokens
