"""Policies on disk and training on pretrained parts: exact round trips, shards, copies, adapters, and every form from its folder to a plan."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from survival import newest_state
from tiny import tiny_config, tiny_model
from tiny_wan import transformer, wan_config, write_pipeline

from wam.codec.codec import make_codec
from wam.codec.linear import LinearCodec
from wam.config import Config, load_config
from wam.inference.session import Session
from wam.model.loading import model_from_backbone
from wam.model.lora import has_lora
from wam.model.wam import WorldActionModel
from wam.pretrained import Policy, from_pretrained, save_components, save_pretrained, weights_sha256
from wam.text.cache import CachedText
from wam.text.text import OutsideText, make_text, prompt
from wam.training import loop
from wam.training.loop import build_model, train

SAMPLE = Path(__file__).parents[1] / "data" / "metaworld_sample"
CLIPPING = {"version": 1, "method": "quantile", "clip": 1.5, "keys": {}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {form: write_pipeline(tmp_path_factory.mktemp(form), form) for form in ("i2v", "ti2v")}


def _policy(*overrides: str) -> Policy:
    config = tiny_config(*overrides)
    codec = LinearCodec(config.codec)
    codec.fit(torch.randint(0, 256, (8, 4, *config.codec.image_size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    return Policy(config, tiny_model(config), codec, CLIPPING, {"control_hz": 80})


def _same_weights(a: WorldActionModel, b: WorldActionModel) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("overrides", [(), ("model.expert_width=24", "model.goal_image=true"), ("preset=dreamzero",), ("preset=lingbot_va",)])
def test_a_policy_comes_back_to_the_bit_in_one_file_or_many(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    policy = _policy(*overrides)
    hashes = set()
    for name, limit in (("one", 1e9), ("many", 50e3)):
        save_pretrained(policy, tmp_path / name, max_bytes=limit)
        again = from_pretrained(tmp_path / name)
        assert _same_weights(again.model, policy.model) and again.config == policy.config
        assert all(torch.equal(x, again.codec.state_dict()[k]) for k, x in policy.codec.state_dict().items())
        hashes.add(weights_sha256(tmp_path / name))
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2 and len(hashes) == 2
    assert again.config.relations.cells == policy.config.relations.cells
    save_pretrained(again, tmp_path / "many")  # one file in the place of many
    assert not list((tmp_path / "many").glob("model-*")) and _same_weights(from_pretrained(tmp_path / "many").model, policy.model)


def test_bfloat16_is_kept_and_mixed_weights_take_the_backbones_type(tmp_path: Path) -> None:
    policy = _policy()
    policy.model.to(torch.bfloat16)
    save_pretrained(policy, tmp_path)
    assert _same_weights(from_pretrained(tmp_path).model, policy.model)
    assert {p.dtype for p in from_pretrained(tmp_path, dtype=torch.float32).model.parameters()} == {torch.float32}
    policy.model.action_encoder.float()
    save_pretrained(policy, tmp_path)
    assert {p.dtype for p in from_pretrained(tmp_path).model.parameters()} == {torch.bfloat16}


def test_checkpoints_of_before_and_damaged_ones_say_what_to_do(tmp_path: Path) -> None:
    save_pretrained(_policy(), tmp_path, max_bytes=50e3)
    meta = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**meta, "format": "wam-policy-1", "wam_version": "0.1.0"}))
    with pytest.raises(ValueError, match=r"'wam-policy-1', of wam 0\.1\.0, .* this version reads 'wam-policy-2': train it again, or use it with that version"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(meta))
    shard = sorted(tmp_path.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"cannot be read \(shard .*{shard.name} is cut short"):
        from_pretrained(tmp_path)


def test_instructions_are_put_into_templates() -> None:
    assert prompt("Open the {Door}", "A robot {instruction:lower}! {instruction}.") == "A robot open the {door}! Open the {Door}."
    assert prompt("open", "{instruction}") == "open"
    with pytest.raises(ValueError, match="does not hold the instruction"):
        prompt("open", "a robot")
    with pytest.raises(ValueError, match=r"text\.template is 'a robot'"):
        load_config(None, ["text.template=a robot"])


# ------------------------------------------------------------------------------------------------ pretrained parts


def test_new_parts_come_from_the_seed_and_the_expert_from_the_video(folders: dict[str, Path]) -> None:
    config = wan_config("ti2v", folders["ti2v"], "model.expert_width=24")
    text = make_text(config.text)
    one, two = (WorldActionModel.from_pretrained_backbone(folders["ti2v"], config, text) for _ in range(2))
    assert _same_weights(one, two) and not any(p.is_meta for p in one.parameters())
    expected = transformer("ti2v").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in one.backbone.state_dict().items())
    narrow, wide = one.expert.blocks[0].attn1.to_out[0].weight, one.backbone.blocks[0].attn1.to_out[0].weight
    assert torch.equal(narrow[0], wide[0]) and torch.equal(narrow[-1], wide[-1])
    other = WorldActionModel.from_pretrained_backbone(folders["ti2v"], replace(config, training=replace(config.training, seed=1)), text)
    assert not torch.equal(other.action_encoder.embed.weight, one.action_encoder.embed.weight)


def test_codec_and_text_of_another_size_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    config = wan_config("ti2v", folders["ti2v"])
    with pytest.raises(ValueError, match=r"codec\.channels is 5, but the VAE's z_dim is 6; set codec\.channels=6"):
        make_codec(replace(config.codec, channels=5))
    with pytest.raises(ValueError, match=r"codec\.patch is 8, but the VAE's spatial stride is 16"):
        make_codec(replace(config.codec, patch=8))
    with pytest.raises(ValueError, match=r"text\.width is 24, but the embeddings of .* have 16; set text\.width=16"):
        make_text(replace(config.text, width=24))
    with pytest.raises(FileNotFoundError, match=r"nothing says where the vae is: .*set codec\.pretrained"):
        make_codec(replace(config.codec, pretrained=None), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"text\.pretrained and text\.cache are null"):
        make_text(replace(config.text, pretrained=None))


def test_the_text_encoder_is_loaded_for_what_the_cache_lacks_and_not_before(folders: dict[str, Path], tmp_path: Path) -> None:
    config = replace(wan_config("ti2v", folders["ti2v"]).text, cache=str(tmp_path))
    outside = make_text(replace(config, cache=None))
    assert isinstance(outside, OutsideText) and not list(outside.parameters())
    first = make_text(config)
    assert isinstance(first, CachedText) and torch.equal(first(["open the drawer"]), outside(["open the drawer"]))
    again = make_text(config)
    assert isinstance(again, CachedText) and torch.equal(again(["open the drawer"]), outside(["open the drawer"])) and again.encoder is None
    assert torch.equal(again(["close it"]), outside(["close it"])) and again.encoder is not None
    alone = make_text(replace(config, pretrained=None))
    with pytest.raises(FileNotFoundError, match="no sound embedding of the instruction 'push'"):
        alone(["push"])


# ------------------------------------------------------------------------------------------------ from a folder to a plan


def _training(form: str, folder: Path, *overrides: str) -> Config:
    data = (f"data.root={SAMPLE}", "data.executed_action=action.executed", "timeline.blocks=2")
    quick = ("training.steps=2", "training.batch_size=2", "training.warmup_steps=1", "training.validation_batches=1", "training.validation_samples=2", "training.precision=fp32", "training.modes={skip: 1, joint: 1}")
    return wan_config(form, folder, *data, *quick, "training.state_dropout=0", "sampling.steps=2", *overrides)


def _plan(policy: Policy) -> np.ndarray:
    session = Session(policy, ["open the drawer"], "metaworld", [3])
    generator = np.random.default_rng(0)
    session.observe(generator.integers(0, 256, (1, 1, 64, 64, 3), dtype=np.uint8), np.zeros((1, 4), np.float32))
    plan = session.plan("joint")
    session.commit(plan.actions)
    session.observe(generator.integers(0, 256, (1, 4, 64, 64, 3), dtype=np.uint8), np.zeros((1, 4), np.float32))
    actions = session.plan("skip").actions
    assert np.isfinite(actions).all() and actions.shape == (1, 8, 4)
    return actions


@pytest.mark.parametrize("form", ["i2v", "ti2v"])
def test_training_on_pretrained_parts_end_to_end(folders: dict[str, Path], tmp_path: Path, form: str) -> None:
    config = _training(form, folders[form], f"text.cache={tmp_path / 'text'}")
    checkpoint = train(config, tmp_path / "run")
    policy = from_pretrained(checkpoint)
    assert not torch.equal(policy.model.backbone.patch_embedding.weight, transformer(form).patch_embedding.weight)
    assert (policy.image is not None) == (form == "i2v") and policy.codec.channels == config.codec.channels
    actions = _plan(policy)

    policy.model.text(["an instruction that the cache lacks"])  # loads the encoder
    save_pretrained(policy, tmp_path / "copy")
    save_components(policy, tmp_path / "copy")
    parts = {"vae", "text_encoder", "tokenizer", *(["image_encoder"] if form == "i2v" else [])}
    assert {path.name for path in (tmp_path / "copy").iterdir() if path.is_dir()} == parts
    text = (tmp_path / "copy" / "config.yaml").read_text().replace(str(folders[form]), "/gone").replace(str(tmp_path / "text"), str(tmp_path / "other"))
    (tmp_path / "copy" / "config.yaml").write_text(text)
    meta = json.loads((tmp_path / "copy" / "config.json").read_text())
    meta.pop("text_space")
    (tmp_path / "copy" / "config.json").write_text(json.dumps(meta))
    assert np.array_equal(_plan(from_pretrained(tmp_path / "copy")), actions)  # from its own folder alone


def test_adapters_train_and_come_back_on_their_base(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["ti2v"]
    config = _training("ti2v", folder, "model.lora={rank: 2, alpha: 4, dropout: 0.1}", "training.save_every=1", "model.image_dim=32", "image.kind=clip", f"image.pretrained={folders['i2v']}")
    model = build_model(config, "cpu", make_text(config.text))
    frozen = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items() if ".lora_" not in name}
    new = {name for name, p in model.backbone.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert new and all("image_embedder" in name or "add_" in name or "norm_added" in name for name in new)

    checkpoint = train(config, tmp_path / "run")
    whole = from_pretrained(checkpoint)
    assert not has_lora(whole.model) and whole.config.model.lora is None
    changed = {name for name, tensor in whole.model.backbone.state_dict().items() if not torch.equal(tensor, frozen.get(name, frozen.get(_wrapped(name), tensor)))}
    adapted = {name for name in changed if name not in new}
    assert adapted and all(any(t in name for t in config.model.lora.targets) and name.endswith("weight") for name in adapted)
    size = sum(path.stat().st_size for path in (checkpoint / "adapter").glob("*.safetensors"))
    assert size < 0.5 * sum(4 * p.numel() for p in whole.model.backbone.parameters())

    actions = _plan(whole)
    save_pretrained(whole, tmp_path / "merged")  # whole weights, no base needed
    assert not (tmp_path / "merged" / "adapter").exists() and np.array_equal(_plan(from_pretrained(tmp_path / "merged")), actions)

    transformer("ti2v", seed=7).save_pretrained(tmp_path / "other" / "transformer")
    text = (checkpoint / "config.yaml").read_text().replace(f"pretrained: {folder}\n  layers", f"pretrained: {tmp_path / 'other'}\n  layers")
    (checkpoint / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"trained on other weights than this backbone's: expected sha256 \w{64}, found \w{64}"):
        from_pretrained(checkpoint)


def test_adapters_resume_to_the_bit_dropout_included(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _training("ti2v", folders["ti2v"], "model.lora={rank: 2, dropout: 0.5}", "model.gradient_checkpointing=true", "training.steps=3", "training.validate_every=3", "training.save_every=1")
    train(config, tmp_path / "whole")
    real, calls = loop._Run._step, []

    def interrupted(self: loop._Run, batch: dict, step: int, progress: float):
        if step == 1 and not calls:
            calls.append(step)
            raise KeyboardInterrupt
        return real(self, batch, step, progress)

    monkeypatch.setattr(loop._Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts")
    train(config, tmp_path / "parts")
    whole, parts = (newest_state(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not any(".base_layer." in name for name in whole)  # what is frozen is not kept


def _wrapped(name: str) -> str:
    path, _, last = name.rpartition(".")
    return f"{path}.base_layer.{last}"


def test_a_frozen_backbone_is_held_in_bfloat16_where_it_computes_in_it(folders: dict[str, Path], tmp_path: Path) -> None:
    config = _training("ti2v", folders["ti2v"], "model.lora={rank: 2}", "training.precision=bf16")
    model = build_model(config, "cpu", make_text(config.text))
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    meta = {"control_hz": 80}
    codec = make_codec(config.codec)
    save_pretrained(Policy(config, model, codec, CLIPPING, meta, None), tmp_path)
    again = from_pretrained(tmp_path)  # as it was held, whichever type the base is stored in
    assert {p.dtype for p in again.model.parameters()} == {torch.bfloat16}
    whole = model_from_backbone(lambda c, b: WorldActionModel(c, b, None), folders["ti2v"], config, dtype=torch.bfloat16)
    assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}
