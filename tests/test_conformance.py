"""The conformance command: pairs are checked before they are used, every output is accounted for, and the numbers are the released ones."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from wam.cli import main
from wam.evaluation.conformance import lingbot
from wam.evaluation.conformance.case import Case, load_case
from wam.evaluation.conformance.compare import compare
from wam.evaluation.conformance.run import ConformanceError, conformance
from wam.evaluation.conformance.slots import Pool, pool_view, slot_view
from wam.model.cache import KVCache
from wam.timeline import Kind

CASES = Path(__file__).parent / "conformance"
NAMES = sorted(path.stem for path in CASES.glob("*.json"))


def copy(name: str, folder: Path) -> Path:
    for suffix in (".json", ".safetensors"):
        shutil.copy(CASES / f"{name}{suffix}", folder / f"{name}{suffix}")
    return folder / f"{name}.json"


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite(path: Path, outputs: dict[str, Tensor], **fields: object) -> Path:
    """The same case with other outputs, and a JSON that agrees."""
    case = load_case(path)
    parts = {"weights": case.weights, "inputs": case.inputs, "outputs": outputs}
    data = safetensors.torch.save({f"{part}/{name}": x for part, tensors in parts.items() for name, x in tensors.items()})
    path.with_suffix(".safetensors").write_bytes(data)
    described = {name: {"shape": list(x.shape)} for name, x in outputs.items()}
    counts = {part: len(tensors) for part, tensors in parts.items()}
    edit(path, outputs=described, tensor_count=counts, safetensors_sha256=hashlib.sha256(data).hexdigest(), safetensors_bytes=len(data), **fields)
    return path


# ------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("name", NAMES)
def test_the_released_numbers(name: str) -> None:
    (result,) = conformance([CASES / f"{name}.json"])
    assert [line.output for line in result.lines] == list(load_case(CASES / f"{name}.json").spec["outputs"])  # each one, and none twice
    assert result.worst is not None and result.worst < 5e-6


def test_an_output_that_nobody_computes_fails_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy("fastwam_base", tmp_path)
    case = load_case(path)
    keep = {name: case.outputs[name] for name in ("infer_action_4steps/action", "infer_joint_4steps/video")}
    rewrite(path, keep)
    assert main(["conformance", str(path), "--json", str(tmp_path / "out.json")]) == 0
    tree = json.loads((tmp_path / "out.json").read_text())
    assert tree["passed"] and len(tree["cases"][0]["outputs"]) == 2

    rewrite(path, keep | {"infer_action_4steps/entropy": torch.zeros(1), "values/q": torch.zeros(1)})
    capsys.readouterr()
    assert main(["conformance", str(path), "--json", str(tmp_path / "out.json")]) == 2
    said = capsys.readouterr()
    assert "does not compute this output" in said.out and "no stage computes this output" in said.out
    assert "0 of 1 cases, 2 of 4 outputs within tolerance" in said.err
    assert [line["passed"] for line in json.loads((tmp_path / "out.json").read_text())["cases"][0]["outputs"]] == [True, True, False, False]


@pytest.mark.parametrize("variant", ["joint", "idm"])
def test_another_table_shows(variant: str, tmp_path: Path) -> None:
    """The base case's weights and numbers, under the mask of another variant: actions part, the first frame does not."""
    path = copy("fastwam_base", tmp_path)
    outputs = {name: load_case(path).outputs[name] for name in ("train/action_velocity", "infer_action_4steps/action")}
    config = json.loads(path.read_text())["config"]
    rewrite(path, outputs, config=config | {"variant": variant})
    with pytest.raises(ConformanceError, match="0 of 1 cases, 0 of 2 outputs"):
        conformance([path])


def test_a_cache_that_never_forgets_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = copy("lingbot", tmp_path)
    names = ("chunk1/video", "cache/after_infer_chunk1/mask", "cache/after_infer_chunk2/mask", "chunk2/observe_video_tokens_out")
    outputs = {name: x for name, x in load_case(path).outputs.items() if name in names}
    rewrite(path, outputs)
    conformance([path])
    monkeypatch.setattr(KVCache, "forget", lambda *_: None)
    with pytest.raises(ConformanceError):
        conformance([path])


def episode(window: int, frames: int, per_frame: int, chunks: int) -> Case:
    """LingBot-VA's case with other chunks and another window: no stored numbers, but slots follow from the calls alone."""
    case = load_case(CASES / "lingbot.json")
    spec: dict[str, Any] = json.loads(json.dumps(case.spec))
    spec["job"] |= {"attn_window": window, "frame_chunk_size": frames, "action_per_frame": per_frame, "num_inference_steps": 3, "action_num_inference_steps": 3}
    generator = torch.Generator().manual_seed(0)
    inputs = {name: x for name, x in case.inputs.items() if not name.startswith("chunk")}
    for chunk in range(chunks):
        shapes = {"noise_video": (6, frames, 4, 6), "observed_latents": (6, frames - (chunk == 0), 4, 6), "noise_action": (7, frames, per_frame, 1), "executed_actions": (7, frames, per_frame, 1)}
        inputs |= {f"chunk{chunk}/{name}": torch.randn(1, *shape, generator=generator) for name, shape in shapes.items()}
    outputs = {f"cache/after_{stage}_chunk{chunk}/{name}": torch.zeros(1) for chunk in range(chunks) for stage in ("infer", "observe") for name in ("mask", "id", "is_pred")}
    return Case(case.path, spec, case.weights, inputs, outputs | {"chunk0/video_tokens_out_first": torch.zeros(2, 1, 1)})


@pytest.mark.parametrize(("window", "frames", "per_frame", "chunks"), [(2, 2, 5, 4), (4, 1, 3, 5), (6, 3, 2, 5)])
def test_our_ring_holds_what_the_released_slots_do(window: int, frames: int, per_frame: int, chunks: int) -> None:
    """Other windows and chunk sizes, past several evictions: what our cache holds against the release's order of calls."""
    case = episode(window, frames, per_frame, chunks)
    (stage,) = lingbot.prepare(case).stages
    ours = stage.run()
    tokens = {Kind.VC: frames * 6, Kind.AC: frames * per_frame}
    for moment, view in follow(Pool(window // 2 * sum(tokens.values())), chunks, tokens).items():
        for name, expected in view.items():
            assert torch.equal(ours[f"cache/{moment}/{name}"], expected), (moment, name)


# ------------------------------------------------------------------------------------------------ reading, judging, slots


def test_pairs_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    path = copy("fastwam_base", tmp_path)
    load_case(path)

    tensors = path.with_suffix(".safetensors")
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"sha256 .*it has {len(whole) - 100} bytes, expected {len(whole)}.*copy the pair again"):
        load_case(path)
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit
    with pytest.raises(ValueError, match=r"sha256 .*its length is right"):
        load_case(path)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=r"fastwam_base.safetensors is missing"):
        load_case(path)

    tensors.write_bytes(whole)
    spec = json.loads(path.read_text())
    edit(path, tensor_count=spec["tensor_count"] | {"outputs": 20})
    with pytest.raises(ValueError, match="says 20 outputs, but its safetensors holds 21"):
        load_case(path)
    edit(path, tensor_count=spec["tensor_count"], outputs=spec["outputs"] | {"train/loss": {"shape": [2]}})
    with pytest.raises(ValueError, match=r"outputs/train/loss has shape \[1\], described as \[2\]"):
        load_case(path)
    edit(path, format="golden-v2")
    with pytest.raises(ValueError, match="format 'golden-v2'"):
        load_case(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_case(path)
    with pytest.raises(FileNotFoundError, match=r"no case .*nothing.json; JSON files in .*: .*fastwam_base.json"):
        load_case(tmp_path / "nothing.json")


def test_two_numbers_decide() -> None:
    stored = torch.linspace(-1, 1, 1001)
    assert compare("x", stored, stored).passed
    assert not compare("x", stored, stored * (1 + 2e-5)).passed  # everywhere a little: the relative error
    spike = stored.clone()
    spike[7] += 1.5e-4
    line = compare("x", stored, spike)
    assert not line.passed and line.relative_l2 is not None and line.relative_l2 < 1e-5  # once, and more: the largest error
    assert compare("x", stored, spike, tolerance=2e-5).passed
    assert not compare("x", stored, stored[:-1]).passed
    assert not compare("x", stored, torch.full_like(stored, float("nan"))).passed
    assert compare("x", torch.zeros(3), torch.zeros(3)).passed and not compare("x", torch.zeros(3), torch.full((3,), 1e-9)).passed


def follow(pool: Pool, chunks: int, tokens: dict[Kind, int]) -> dict[str, dict[str, torch.Tensor]]:
    """The release's order of calls, with a cache that holds just what the pool does."""
    seen = {}

    def view(stage: str) -> None:
        held: dict[tuple[Kind, int], int] = {}
        for owner in pool.owners:
            if owner:
                held[owner[0]] = held.get(owner[0], 0) + 1
        seen[stage] = slot_view(pool, held)

    for chunk in range(chunks):
        for kind in (Kind.VC, Kind.AC):
            for _ in range(3):
                pool.call((kind, chunk), tokens[kind], "drop")
            pool.call((kind, chunk), tokens[kind], "predicted")
        view(f"after_infer_chunk{chunk}")
        pool.free_predicted()
        for kind in (Kind.VC, Kind.AC):
            pool.call((kind, chunk), tokens[kind], "real")
        view(f"after_observe_chunk{chunk}")
    return seen


def test_slots_are_the_releases() -> None:
    case = load_case(CASES / "lingbot.json")
    seen = follow(Pool(44), 3, {Kind.VC: 12, Kind.AC: 10})
    stages = [name for name in case.outputs if name.startswith("cache/") and "last_layer" not in name]
    assert len(stages) == 15
    for name in stages:
        _, stage, field = name.split("/")
        assert torch.equal(seen[stage][field], case.outputs[name]), name


def test_a_cache_that_forgets_or_keeps_too_long_shows_in_the_slots() -> None:
    pool = Pool(10)
    pool.call((Kind.VC, 0), 6, "real")
    pool.call((Kind.AC, 0), 4, "predicted")
    held = {(Kind.VC, 0): 6, (Kind.AC, 0): 4}
    assert slot_view(pool, held)["mask"].sum() == 10
    assert slot_view(pool, {(Kind.VC, 0): 6})["id"].tolist() == [0] * 6 + [-1] * 4
    pool.free_predicted()
    with pytest.raises(ValueError, match=r"our cache still shows Ac\[0\]"):
        slot_view(pool, held)
    keys = {(Kind.VC, 0): torch.ones(2, 6, 1, 3)}
    assert pool_view(pool, keys, (2, 10, 1, 3))[:, :, 0, 0].tolist() == [[1.0] * 6 + [0.0] * 4] * 2
