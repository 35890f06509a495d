"""Released names and ours: maps that read both ways, encoders that compute what the released ones do, Wan's folders, reports."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from transformers import CLIPVisionModel, UMT5EncoderModel

from tests.released import full_size, tiny_tensors
from wam.cli import main
from wam.convert import convert
from wam.convert.clip import CLIP, clip_component
from wam.convert.dreamzero import KEYS
from wam.convert.keys import ROW, SAME, TRANSPOSED, KeyMap, Rule, Unused, flat, part
from wam.convert.report import Component, Report, plan, write
from wam.convert.umt5 import UMT5, umt5_component
from wam.convert.vae import WAN21, WAN22
from wam.convert.wan import WAN
from wam.shards import MemorySource, ShardReader, ShardWriter

OPS = KeyMap([Rule("a.{n}.{p}", "b.{n}.x.{p}"), Rule("l.weight", "e.weight", TRANSPOSED), Rule("l.bias", "e.bias", ROW), Rule("c", "d", flat(2)), *(Rule("qkv", x, part(i, 3)) for i, x in enumerate("qkv"))])


def component(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# ------------------------------------------------------------------------------------------------ key maps


def test_numbers_come_back_as_they_were() -> None:
    for name, shape in {"a.7.weight": (3, 4), "l.weight": (3, 4), "l.bias": (3,), "c": (1, 1, 5)}.items():
        tensor = torch.randn(shape)
        new, moved = OPS.forward(name, tensor)
        back, same = OPS.backward(new, moved)
        assert back == name == OPS.source_of(new) and torch.equal(same, tensor) and torch.equal(moved.norm(), tensor.norm())
    assert OPS.forward("a.7.weight", tensor)[0] == "b.7.x.weight" and OPS.forward("l.weight", torch.zeros(3, 4))[1].shape == (1, 4, 3)
    whole = torch.randn(6, 2)
    assert torch.equal(torch.cat(list(OPS.apply("qkv", whole).values())), whole) and OPS.source_of("k") == "qkv"
    for call, message in (
        (lambda: OPS.forward("qkv", whole), "becomes 3 tensors"),
        (lambda: OPS.forward("a.x.weight", whole), "becomes 0 tensors .*no rule"),
        (lambda: OPS.source_of("b.x.x.bias"), "no released tensor becomes 'b.x.x.bias'"),
        (lambda: OPS.backward("k", whole), "is a part of the released 'qkv'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_prefixes_and_sums() -> None:
    both = OPS.within("old.", "new.") + KeyMap([], [Unused(r"junk\..*", "no use")]).within("old.")
    assert both.forward("old.a.0.bias", torch.zeros(1))[0] == "new.b.0.x.bias" and not both.targets("a.0.bias")
    assert both.unused("old.junk.1") == "no use" and both.unused("junk.1") is None and both.unused("oldXjunk.1") is None


@pytest.mark.parametrize("which", ["14b", "5b"])
def test_every_released_name_has_one_place_and_comes_back(which: str) -> None:
    maps = KEYS.within("action_head.model.", "m/") + UMT5.within("action_head.text_encoder.", "t/") + CLIP.within("action_head.image_encoder.model.", "i/")
    maps += (WAN21 if which == "14b" else WAN22).within("action_head.vae.model.", "v/")
    seen: set[str] = set()
    for name in full_size(which):
        targets = maps.targets(name)
        assert bool(targets) != (maps.unused(name) is not None), name
        assert len(targets) in (0, 1, 3) and not seen & {target for target, _ in targets}
        seen |= {target for target, _ in targets}
        assert all(maps.source_of(target) == name for target, _ in targets)


# ------------------------------------------------------------------------------------------------ encoders compute the same


def released_t5(w: dict[str, Tensor], ids: Tensor, heads: int) -> Tensor:
    """Wan's text encoder, written out from its own names (one text, no padding)."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    def buckets(distance: Tensor) -> Tensor:
        """32 of them: 16 a side, the first 8 exact, then logarithmic up to 128."""
        far = 8 + (torch.log(distance.abs().clamp(min=1).float() / 8) / torch.log(torch.tensor(128 / 8)) * 8).long()
        return (distance > 0).long() * 16 + torch.where(distance.abs() < 8, distance.abs(), far.clamp(max=15))

    x = w["token_embedding.weight"][ids]
    places = torch.arange(len(ids))
    bucket = buckets(places[None, :] - places[:, None])
    for n in range(2):
        b = component(w, f"blocks.{n}.")
        y = norm(x, b["norm1.weight"])
        q, k, v = (F.linear(y, b[f"attn.{s}.weight"]).unflatten(-1, (heads, -1)).transpose(0, 1) for s in "qkv")
        scores = q @ k.transpose(1, 2) + b["pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)
        x = x + F.linear((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), b["attn.o.weight"])
        y = norm(x, b["norm2.weight"])
        x = x + F.linear(F.linear(y, b["ffn.fc1.weight"]) * F.gelu(F.linear(y, b["ffn.gate.0.weight"]), approximate="tanh"), b["ffn.fc2.weight"])
    return norm(x, w["norm.weight"])


def released_clip(w: dict[str, Tensor], images: Tensor, heads: int, layers: int) -> Tensor:
    """open-CLIP's image transformer, written out from its own names, after `layers` layers."""
    width = w["pre_norm.weight"].shape[0]
    x = F.conv2d(images, w["patch_embedding.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_embedding"].expand(len(x), -1, -1), x], 1) + w["pos_embedding"]
    x = F.layer_norm(x, (width,), w["pre_norm.weight"], w["pre_norm.bias"], 1e-5)
    for n in range(layers):
        b = component(w, f"transformer.{n}.")
        y = F.layer_norm(x, (width,), b["norm1.weight"], b["norm1.bias"], 1e-5)
        q, k, v = F.linear(y, b["attn.to_qkv.weight"], b["attn.to_qkv.bias"]).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, b["attn.proj.weight"], b["attn.proj.bias"])
        y = F.layer_norm(x, (width,), b["norm2.weight"], b["norm2.bias"], 1e-5)
        x = x + F.linear(F.gelu(F.linear(y, b["mlp.0.weight"], b["mlp.0.bias"])), b["mlp.2.weight"], b["mlp.2.bias"])
    return x


def test_the_text_encoder_computes_what_the_released_one_does(tmp_path: Path) -> None:
    weights = component(tiny_tensors("14b"), "action_head.text_encoder.")
    weights = {name: 5 * tensor if "attn" in name or "pos" in name else tensor for name, tensor in weights.items()}  # so that positions matter
    source = MemorySource(weights)
    part_ = umt5_component(source, "", "x")
    plan(source, [part_], "x")
    write(source, [part_], tmp_path)
    encoder = UMT5EncoderModel.from_pretrained(tmp_path, subfolder="text_encoder")
    ids = torch.randint(0, 384, (150,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder(ids[None]).last_hidden_state[0], released_t5(weights, ids, 2), atol=1e-4, rtol=1e-4)


def test_the_image_encoder_computes_what_the_released_one_does(tmp_path: Path) -> None:
    weights = component(tiny_tensors("14b"), "action_head.image_encoder.model.")
    source = MemorySource(weights)
    part_ = clip_component(source, "", "x")
    fates = plan(source, [part_], "x")
    assert {fate.source for fate in fates if fate.fate == "unused"} == {"visual.head", "log_scale"}
    write(source, [part_], tmp_path)
    encoder, loaded = CLIPVisionModel.from_pretrained(tmp_path, subfolder="image_encoder", output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    found = encoder(pixel_values=images, output_hidden_states=True).hidden_states
    for layers in (1, 2):
        torch.testing.assert_close(found[layers], released_clip(component(weights, "visual."), images, 1, layers), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ Wan's own folders


def write_wan(folder: Path, which: str) -> Path:
    """A tiny Wan checkpoint as Wan publishes it: shards of the transformer, and pickles."""
    tensors = tiny_tensors("5b" if which == "5b" else "14b")
    if which == "t2v":  # no image branch, and no channels for the first frame
        tensors = {name: tensor for name, tensor in tensors.items() if not re.search(r"model\.(img_emb|blocks.*_img)", name)}
        tensors["action_head.model.patch_embedding.weight"] = torch.randn(48, 16, 1, 2, 2)
    with ShardWriter(folder, "diffusion_pytorch_model", 100_000) as writer:
        for name, tensor in component(tensors, "action_head.model.").items():
            if not name.startswith(("action_", "state_")):
                writer.add(name, tensor)
    torch.save(component(tensors, "action_head.text_encoder."), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(component(tensors, "action_head.vae.model."), folder / ("Wan2.2_VAE.pth" if which == "5b" else "Wan2.1_VAE.pth"))
    clip = component(tensors, "action_head.image_encoder.model.") | {"textual.token_embedding.weight": torch.zeros(3, 4)}
    torch.save(clip, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": 2, "eps": 1e-6}))
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("which", ["t2v", "14b", "5b"])
def test_wan_becomes_a_folder_that_diffusers_reads(which: str, tmp_path: Path) -> None:
    src, dst = write_wan(tmp_path / "src", which), tmp_path / "dst"
    report = convert("wan", src, dst)
    model, loaded = WanTransformer3DModel.from_pretrained(dst, subfolder="transformer", output_loading_info=True)
    assert not any(loaded[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    released = ShardReader(src, "diffusion_pytorch_model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(WAN.backward(name, tensor)[1], released.get(WAN.source_of(name)))
    vae, loaded = AutoencoderKLWan.from_pretrained(dst, subfolder="vae", output_loading_info=True)
    assert not any(loaded[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert vae.encode(torch.zeros(1, 3, 5, 32, 32)).latent_dist.mode().shape == ((1, 48, 2, 2, 2) if which == "5b" else (1, 16, 2, 4, 4))
    assert model.config.image_dim == (None if which == "t2v" else 16)
    UMT5EncoderModel.from_pretrained(dst, subfolder="text_encoder")
    CLIPVisionModel.from_pretrained(dst, subfolder="image_encoder")
    assert (dst / "tokenizer" / "tokenizer_config.json").is_file()
    told = json.loads((dst / "conversion.json").read_text())
    assert told["tensors"] == len(told["fates"]) == len(report.fates) and report.count(fate="unused") == 3
    with pytest.raises(ValueError, match="source and destination are both"):
        convert("wan", dst, dst)


def test_wan_of_another_size_than_its_heads_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = write_wan(tmp_path / "src", "5b")
    (src / "config.json").write_text('{"num_heads": 5}')
    assert main(["convert", "wan", str(src), str(tmp_path / "dst")]) == 2
    assert "the width is 48 and there are 5 heads" in capsys.readouterr().err and not (tmp_path / "dst").exists()
    assert main(["convert", "wan", str(tmp_path / "nowhere"), str(tmp_path / "dst")]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    shards = sorted(src.glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-7])
    assert main(["convert", "wan", str(src), str(tmp_path / "dst")]) == 2
    assert f"{shards[0].name} is cut short" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the plan


def test_each_tensor_has_one_fate_or_the_plan_says_which_has_none() -> None:
    keys = KeyMap([Rule("a", "x"), Rule("same", "same"), Rule("b", "y", ROW), *(Rule("c", f"z{i}", part(i, 2)) for i in range(2)), Rule("d", "x", SAME)], [Unused("junk", "for training only")])
    target = Component("part", keys, {"x": (2,), "same": (1,), "y": (1, 3), "z0": (2, 2), "z1": (2, 2)})
    tensors = {"a": torch.zeros(2), "same": torch.zeros(1), "b": torch.zeros(3), "c": torch.zeros(4, 2), "junk": torch.zeros(9)}
    fates = plan(MemorySource(tensors), [target], "here")
    assert [fate.fate for fate in fates] == ["renamed", "copied", "reshaped", "split", "unused"]
    report = Report("test", "here")
    report.add(fates)
    assert report.origins == {"part": {"x": "a", "same": "same", "y": "b", "z0": "c", "z1": "c"}}
    assert "unused: junk: for training only" in report.table() and report.to_dict()["summary"]["part"]["unused"] == 1
    for change, message in (
        ({"stray": torch.zeros(5)}, r"here: unexpected tensor 'stray' \[5\]"),
        ({"a": torch.zeros(3)}, r"tensor 'a' has shape \[3\]; expected one that makes \[2\] for part 'x', found \[3\]"),
        ({"a": None}, r"tensor 'a' is missing; expected it with 2 numbers for part 'x' \[2\]"),
        ({"d": torch.zeros(2)}, "tensors 'a' and 'd' both become 'x'"),
    ):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        with pytest.raises(ValueError, match=message):
            plan(MemorySource(changed), [target], "here")
    with pytest.raises(ValueError, match=r"unexpected tensor 'a' \[2\]; part of this size has no 'x'"):
        plan(MemorySource(tensors), [Component("part", keys, {"same": (1,)})], "here")
