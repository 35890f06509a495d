"""DreamZero's checkpoints: full size on names and shapes alone, small ones from folder to policy, LoRA, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.released import (
    ACTION,
    IMAGE,
    LORA_MODEL,
    MODEL,
    STATE,
    STATISTICS,
    full_size,
    lora_tensors,
    tiny_tensors,
    write_release,
    write_settings,
    write_tensors,
)
from wam.config import load_config
from wam.convert import convert
from wam.convert.dreamzero import KEYS, PARTS, model_config, model_shapes
from wam.convert.dreamzero_robot import TEMPLATES, read_robot, resolve
from wam.convert.options import Options
from wam.convert.report import Component, Report, plan, shapes
from wam.convert.wan import transformer_config
from wam.data.normalize import Normalizer
from wam.model.lora import base_identity
from wam.model.wam import WorldActionModel
from wam.pretrained import from_pretrained
from wam.shards import MemorySource, ShardReader, ShardWriter, build_empty
from wam.text.text import prompt

CASES = Path(__file__).parent / "conformance"
OPTIONS = {which: Options(image_size=size) for which, size in IMAGE.items()}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny 14B checkpoint; not to be changed."""
    return write_release(tmp_path_factory.mktemp("release"))


# ------------------------------------------------------------------------------------------------ full size


@pytest.mark.parametrize(("which", "tensors", "parameters", "unused"), [("14b", 2146, 16_484_292_448, 2), ("5b", 1828, 5_606_692_832, 2)])
def test_every_tensor_of_the_full_checkpoints_has_its_place(which: str, tensors: int, parameters: int, unused: int) -> None:
    source = MemorySource({name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in full_size(which).items()})
    sizes = {name.removeprefix(MODEL): source.shape(name) for name in source.names() if name.startswith(MODEL)}
    config = model_config(sizes, {"max_chunk_size": 4, "num_frame_per_block": 2, "num_action_per_block": 24, "frame_seqlen": 880 if which == "14b" else 50})
    model = build_empty(lambda: WorldActionModel(config, text=torch.nn.Identity()))  # type: ignore[arg-type]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    expected = model_shapes(config, transformer_config(source, MODEL, "here"))
    assert expected == shapes(model)  # worked out from the sizes, and by the model itself
    components = [Component("transformer", KEYS.within(MODEL), expected), *(build(source, prefix, "here") for prefix, build in PARTS.values())]
    report = Report("dreamzero", "here")
    report.add(plan(source, components, "here"))
    assert len(report.fates) == tensors and report.count(fate="unused") == unused
    assert {name: len(origins) for name, origins in report.origins.items()} == {c.name: len(c.targets) for c in components}
    assert config.timeline.frame_stride == 3 and config.model.first_frame == ("concat" if which == "14b" else "token")


# ------------------------------------------------------------------------------------------------ from folder to policy


@pytest.mark.parametrize("which", ["14b", "5b"])
def test_a_release_becomes_a_policy(which: str, tmp_path: Path) -> None:
    tensors = tiny_tensors(which, dtype=torch.bfloat16)
    report = convert("dreamzero", write_release(tmp_path / "src", which, tensors), tmp_path / "dst", OPTIONS[which])
    assert len(report.fates) == len(tensors)
    policy = from_pretrained(tmp_path / "dst")
    state = policy.model.state_dict()
    for name, tensor in tensors.items():
        if name.startswith(MODEL):
            ours, moved = KEYS.forward(name.removeprefix(MODEL), tensor)
            assert torch.equal(state.pop(ours), moved) and moved.dtype == torch.bfloat16, name
    assert not [name for name in state if name.startswith(("backbone", "action", "state"))]
    config = policy.config
    assert (config.model.actions, config.model.states, config.model.mlp_hidden) == (ACTION, STATE, 12) and config.model.embodiment_weights == "shared"
    assert policy.control_hz == 15 and policy.meta["relative_actions"] == list(range(7)) and policy.meta["prompt_template"] == config.text.template
    assert policy.image is not None and policy.image.framing == "stretch"
    text = prompt("Pick Up the Cup", config.text.template)
    assert text.startswith("A multi-view video shows that a robot pick up the cup The video is split into three views: ") and text.endswith(" The robot pick up the cup")


def test_statistics_are_the_releases(release: Path) -> None:
    robot = read_robot(release)
    normalizer = Normalizer.from_dict(json.loads(json.dumps(robot.normalizer.to_dict())))
    x = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    low, high = (np.array([*STATISTICS["action"]["joint_position"][end], *STATISTICS["action"]["gripper_position"][end]]) for end in ("q01", "q99"))
    still = low == high
    expected = np.where(still, x, 2 * (x - low) / np.where(still, 1, high - low) - 1).clip(-1, 1)
    np.testing.assert_allclose(normalizer.normalize("action", x), expected, atol=1e-5)
    assert list(robot.action_keys) == ["joint_position", "gripper_position"]  # conf.yaml's order, not that of the statistics
    assert robot.relative == tuple(range(7)) and robot.state_dim == 8
    assert resolve({"a": {"b": "${c}"}, "c": [1, "${a.d}"]}, "${a.b}") == [1, "${a.d}"]


@pytest.mark.parametrize("case", ["dreamzero_a_i2v", "dreamzero_a_ti2v"])
def test_conformance_weights_through_the_command(case: str, tmp_path: Path) -> None:
    """Other sizes, no frozen parts: those are then read from elsewhere."""
    spec = json.loads((CASES / f"{case}.json").read_text())
    weights = {name.removeprefix("weights/"): tensor for name, tensor in load_file(CASES / f"{case}.safetensors").items() if name.startswith("weights/")}
    write_settings(tmp_path / "src", "14b", action_head_cfg={"config": {"diffusion_model_cfg": spec["config"]}})
    statistics = {"oxe_droid": {"statistics": {kind: {"joint_position": {"q01": [0.0] * 4, "q99": [1.0] * 4}, "gripper_position": {"q01": [0.0], "q99": [1.0]}} for kind in ("state", "action")}}}
    (tmp_path / "src" / "experiment_cfg" / "metadata.json").write_text(json.dumps(statistics))
    write_tensors(tmp_path / "src", {MODEL + name: tensor for name, tensor in weights.items()})
    height, width = (size * 8 for size in (spec["axes"]["H"], spec["axes"]["W"]))
    report = convert("dreamzero", tmp_path / "src", tmp_path / "dst", Options(components="reference", image_size=(height, width), max_bytes=200_000))
    assert report.count(fate="renamed") == len(weights) == spec["tensor_count"]["weights"]
    written = ShardReader(tmp_path / "dst")
    assert len(written.files) > 1
    for name in written.names():
        assert torch.equal(written.get(name), weights[KEYS.source_of(name.removeprefix("model."))])
    config = load_config(tmp_path / "dst" / "config.yaml")
    assert (config.timeline.latents_per_block, config.timeline.actions_per_block, config.timeline.frame_stride) == (2, 6, None)
    assert config.codec.pretrained == config.text.pretrained == ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers" if case.endswith("a_i2v") else "Wan-AI/Wan2.2-TI2V-5B-Diffusers")


# ------------------------------------------------------------------------------------------------ LoRA


def with_base_layers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole checkpoint as newer versions of peft name it, updates beside the layers."""
    lora = lora_tensors(tensors)
    layers = {name.split(".lora_")[0] for name in lora if ".lora_" in name}
    out = {name: tensor for name, tensor in lora.items() if ".lora_" in name}
    for name, tensor in tensors.items():
        if name.startswith(MODEL):
            layer, _, parameter = (LORA_MODEL + name.removeprefix(MODEL)).rpartition(".")
            name = f"{layer}.base_layer.{parameter}" if layer in layers else f"{layer}.{parameter}"
        out[name] = tensor
    return out


def merged_by_hand(tensors: dict[str, Tensor], lora: dict[str, Tensor], scale: float, heads: bool = True) -> dict[str, Tensor]:
    out = dict(tensors)
    for name, tensor in lora.items():
        short = MODEL + name.removeprefix(LORA_MODEL)
        if ".lora_A" in name:
            layer = short.split(".lora_A")[0] + ".weight"
            update = torch.einsum("or,ri->oi", lora[name.replace("lora_A", "lora_B")].double(), tensor.double()) * scale
            out[layer] = (tensors[layer].double() + update).to(tensors[layer].dtype)
        elif ".lora_B" not in name and heads:
            out[short] = tensor
    return out


def check_policy(folder: Path, expected: dict[str, Tensor]) -> None:
    for name, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[MODEL + KEYS.source_of(name.removeprefix("model."))], atol=1e-5, rtol=1e-5)


def test_lora_is_merged_onto_its_base_and_no_other(tmp_path: Path) -> None:
    tensors = tiny_tensors("14b")
    lora, base, src, dst = lora_tensors(tensors), write_release(tmp_path / "base", "14b", tensors), tmp_path / "lora", tmp_path / "dst"
    write_tensors(src, lora)
    write_settings(src, "14b")
    options = dict(image_size=IMAGE["14b"], base=base, components="reference")
    with pytest.raises(ValueError, match="nothing without the checkpoint it was trained on; name that with --base"):
        convert("dreamzero", src, dst, Options(image_size=IMAGE["14b"]))
    with pytest.raises(ValueError, match="does not say which base it was trained on") as caught:
        convert("dreamzero", src, dst, Options(**options))
    known = re.search(r"--base-hash ([0-9a-f]{64})", str(caught.value))
    convert("dreamzero", base, tmp_path / "policy", OPTIONS["14b"])
    assert known and known[1] == base_identity(from_pretrained(tmp_path / "policy").model)  # as a policy that is trained with LoRA calls it
    report = convert("dreamzero", src, dst, Options(**options, base_hash=known[1]))
    check_policy(dst, merged_by_hand(tensors, lora, 1.0))
    assert {fate.source for fate in report.fates} >= set(lora) and report.count(fate="merged") == 3 * 2 * 10  # 2 blocks of 10 layers, and two tensors for each
    assert json.loads((dst / "config.json").read_text())["base_sha256"] == known[1]

    other = write_release(tmp_path / "other", "14b", tiny_tensors("14b", seed=1))
    write_settings(src, "14b", base_sha256=known[1])  # as our own record it
    convert("dreamzero", src, tmp_path / "again", Options(**options))
    with pytest.raises(ValueError, match=f"was trained on the base {known[1]}, but .*other is [0-9a-f]{{64}}"):
        convert("dreamzero", src, tmp_path / "never", Options(**{**options, "base": other}))
    assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match="holds a whole checkpoint, no LoRA"):
        convert("dreamzero", other, tmp_path / "never", Options(**options))
    with pytest.raises(ValueError, match="expected a DreamZero checkpoint as it was released, not a converted one"):
        convert("dreamzero", src, tmp_path / "never", Options(**{**options, "base": tmp_path / "policy"}))
    with pytest.raises(ValueError, match="holds low-rank updates itself"):
        convert("dreamzero", src, tmp_path / "never", Options(**{**options, "base": src}))


def test_a_lora_that_does_not_fit_its_base(release: Path, tmp_path: Path) -> None:
    lora, layer = lora_tensors(tiny_tensors("14b")), LORA_MODEL + "blocks.1.ffn.0"
    ghost = LORA_MODEL + "blocks.9.ffn.0"
    wide = {name: torch.cat([tensor, tensor], -1) for name, tensor in lora.items() if "lora_A" in name}
    cases: list[tuple[dict[str, Tensor | None], str]] = [
        ({**wide}, r"make an update of \[48, 96\], but the base's .* has \[48, 48\]; it was trained on a base of another size"),
        ({f"{layer}.lora_A.default.weight": torch.zeros(3, 48)}, r"lora_A \[3, 48\] and lora_B \[64, 4\]"),
        ({f"{layer}.lora_A.default.weight": None}, r"lora_B.* has no lora_A beside it"),
        ({f"{ghost}.lora_A.weight": torch.zeros(4, 48), f"{ghost}.lora_B.weight": torch.zeros(64, 4)}, r"updates 'action_head\.model\.blocks\.9\.ffn\.0\.weight', which the base does not have"),
        ({f"{LORA_MODEL}action_encoder.W1.b": torch.zeros(1, 50)}, r"W1\.b' has shape \[1, 50\], but the base's has \[1, 48\]"),
        ({f"{LORA_MODEL}other.weight": torch.zeros(2)}, r"unexpected tensor 'action_head\.model\.other\.weight', which .* does not have"),
    ]
    write_settings(tmp_path / "lora", "14b")
    for change, message in cases:
        write_tensors(tmp_path / "lora", {name: tensor for name, tensor in {**lora, **change}.items() if tensor is not None})
        with pytest.raises(ValueError, match=message):
            convert("dreamzero", tmp_path / "lora", tmp_path / "dst", Options(base=release, accept_unknown_base=True, image_size=IMAGE["14b"]))


def test_raw_wan_is_no_base_unless_it_was(tmp_path: Path) -> None:
    tensors = tiny_tensors("14b")
    wan = {name.removeprefix(MODEL): tensor for name, tensor in tensors.items() if name.startswith(MODEL) and not name.startswith((MODEL + "action_", MODEL + "state_"))}
    with ShardWriter(tmp_path / "wan", "diffusion_pytorch_model", 50_000) as writer:
        for name, tensor in wan.items():
            writer.add(name, tensor)
    lora, src = lora_tensors(tensors), tmp_path / "lora"
    write_settings(src, "14b")
    write_tensors(src, lora)
    options = dict(image_size=IMAGE["14b"], base=tmp_path / "wan", components="reference", accept_unknown_base=True)
    with pytest.raises(ValueError, match=r"is Wan itself .* not the DreamZero checkpoint"):
        convert("dreamzero", src, tmp_path / "dst", Options(**options))
    convert("dreamzero", src, tmp_path / "dst", Options(**options, base_is_wan=True))
    check_policy(tmp_path / "dst", merged_by_hand(tensors, lora, 1.0))
    shutil.rmtree(src)
    write_settings(src, "14b")
    write_tensors(src, {name: tensor for name, tensor in lora.items() if "action_encoder" not in name})
    with pytest.raises(ValueError, match="does not bring action_encoder"):
        convert("dreamzero", src, tmp_path / "dst", Options(**options, base_is_wan=True))


def test_updates_beside_their_layers_are_merged_too(tmp_path: Path) -> None:
    tensors = tiny_tensors("5b")
    src = write_release(tmp_path / "src", "5b", with_base_layers(tensors))
    head = json.loads((src / "config.json").read_text())
    head["action_head_cfg"]["config"]["lora_alpha"] = 8  # rank 4: twice the product
    (src / "config.json").write_text(json.dumps(head))
    report = convert("dreamzero", src, tmp_path / "dst", OPTIONS["5b"])
    check_policy(tmp_path / "dst", merged_by_hand(tensors, lora_tensors(tensors), 2.0, heads=False))
    assert report.count() == len(with_base_layers(tensors))


# ------------------------------------------------------------------------------------------------ bad input


def test_broken_checkpoints_are_refused_before_anything_is_written(release: Path, tmp_path: Path) -> None:
    def spoiled(change: Any) -> Path:
        shutil.rmtree(tmp_path / "src", ignore_errors=True)
        shutil.copytree(release, tmp_path / "src")
        change(tmp_path / "src")
        return tmp_path / "src"

    def rewritten(**changes: Tensor | None) -> Any:
        tensors = {name: tensor for name, tensor in (tiny_tensors("14b") | {k.replace("__", "."): v for k, v in changes.items()}).items() if tensor is not None}
        return lambda folder: write_tensors(folder, tensors)

    def settings(**changes: Any) -> Any:
        def change(folder: Path) -> None:
            tree = json.loads((folder / "config.json").read_text())
            tree["action_head_cfg"]["config"]["diffusion_model_cfg"] |= changes
            (folder / "config.json").write_text(json.dumps(tree))

        return change

    def without(pattern: str) -> Any:
        return lambda folder: next(folder.rglob(pattern)).unlink()

    def shard(folder: Path) -> Path:
        return sorted(folder.glob("model-*.safetensors"))[1]

    robot = {"mystery_arm": {"statistics": STATISTICS}}
    two = {"oxe_droid": {"statistics": STATISTICS}, "yam": {"statistics": STATISTICS}}
    cases = [
        (without("*.index.json"), FileNotFoundError, r"index model\.safetensors\.index\.json is missing"),
        (lambda f: shard(f).unlink(), FileNotFoundError, r"shard .*model-00002-of-\d+\.safetensors is missing"),
        (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-9]), ValueError, r"model-00002-of-\d+\.safetensors is cut short: expected [\d,]+ bytes, found"),
        (without("conf.yaml"), FileNotFoundError, r"conf\.yaml is missing"),
        (without("metadata.json"), FileNotFoundError, r"metadata\.json is missing"),
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"config\.json is missing"),
        (settings(dim=5120), ValueError, r"config\.json says dim 5120, but the weights have 48"),
        (settings(frame_seqlen=880), ValueError, r"880 tokens a frame, but images of 32 x 48 make 2 x 3 = 6"),
        (settings(num_heads=7), ValueError, "there are 7 heads"),
        (rewritten(**{f"{MODEL}stray__weight": torch.zeros(3)}), ValueError, r"unexpected tensor 'action_head\.model\.stray\.weight' \[3\]"),
        (rewritten(**{f"{MODEL}blocks.1.norm3.bias": None}), ValueError, r"tensor 'action_head\.model\.blocks\.1\.norm3\.bias' is missing"),
        (rewritten(**{f"{MODEL}blocks.1.ffn.0.bias": torch.zeros(5)}), ValueError, r"blocks\.1\.ffn\.0\.bias' has shape \[5\]; expected one that makes \[64\]"),
        (rewritten(**{f"{MODEL}action_encoder.W2.W": torch.zeros(1, 95, 48)}), ValueError, r"action_encoder\.W2\.W' has shape \[1, 95, 48\]; expected one that makes \[1, 96, 48\]"),
        (rewritten(**{f"{MODEL}state_encoder.layer1.W": torch.zeros(3, 64, 12)}), ValueError, "shares one head among all robots"),
        (rewritten(**{f"{MODEL}patch_embedding.weight": torch.zeros(48, 20, 1, 2, 2)}), ValueError, r"takes 20 channels and head\.head puts out 16"),
        (rewritten(**dict.fromkeys([n for n in tiny_tensors("14b") if ".vae." in n])), ValueError, r"no tensor begins with 'action_head\.vae\.model\.'"),
        (lambda f: (f / "experiment_cfg" / "metadata.json").write_text(json.dumps(robot)), ValueError, "control steps a second of 'mystery_arm' are not known"),
        (lambda f: (f / "experiment_cfg" / "metadata.json").write_text(json.dumps(two)), ValueError, "statistics of oxe_droid, yam; choose one with --embodiment"),
    ]
    for change, kind, message in cases:
        with pytest.raises(kind, match=message):
            convert("dreamzero", spoiled(change), tmp_path / "dst", OPTIONS["14b"])
        assert not (tmp_path / "dst").exists(), message


def test_robots_that_the_release_does_not_know(release: Path, tmp_path: Path) -> None:
    folder = tmp_path / "experiment_cfg"
    folder.mkdir()
    (folder / "conf.yaml").write_text("relative_action: false")
    (folder / "metadata.json").write_text(json.dumps({"statistics": {"mystery_arm": STATISTICS}}))
    with pytest.raises(ValueError, match="text that 'mystery_arm' was trained with is not known"):
        read_robot(tmp_path, control_hz=10)
    robot = read_robot(tmp_path, control_hz=10, template="do {instruction}")
    assert not robot.relative and list(robot.action_keys) == ["gripper_position", "joint_position"] and "in which order" in robot.notes[0]
    with pytest.raises(ValueError, match="no statistics of embodiment 'yam'; it has mystery_arm"):
        read_robot(tmp_path, "yam")
    broken = {"state": STATISTICS["state"], "action": {"joint_position": {"mean": [0.0]}}}
    (folder / "metadata.json").write_text(json.dumps({"statistics": {"mystery_arm": broken}}))
    with pytest.raises(ValueError, match="action 'joint_position' lacks q01 and q99"):
        read_robot(tmp_path)
    assert all(text.count("{instruction:lower}") in (1, 2) for text in TEMPLATES.values())
