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
from wam.evaluation.conformance import fast_wam, lingbot
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


# ------------------------------------------------------------------------------------------------ settings of other cases


def test_guided_actions_go_away_from_the_negative_side(tmp_path: Path) -> None:
    """One step from noise: what both calls said is among the outputs, so the action follows from them."""
    path, scale = copy("lingbot", tmp_path), 2.5
    job = json.loads(path.read_text())["job"] | {"action_guidance_scale": scale, "action_num_inference_steps": 1}
    case = load_case(rewrite(path, load_case(path).outputs, job=job))
    (stage,) = [stage for stage in lingbot.prepare(case).stages if any(name.startswith("chunk") for name in stage.outputs)]
    ours = stage.run()
    positive, negative = ours["chunk1/action_tokens_out_first"]
    used = torch.zeros(7)
    used[job["used_action_channel_ids"]] = 1
    start = case.inputs["chunk1/noise_action"][0, ..., 0].flatten(1).T  # (A, channels)
    expected = (start - negative - scale * (positive - negative)) * used
    torch.testing.assert_close(ours["chunk1/action"][0, ..., 0].flatten(1).T, expected, rtol=1e-5, atol=1e-5)


def test_sampling_may_be_shifted_otherwise_than_training(tmp_path: Path) -> None:
    path = copy("fastwam_base", tmp_path)
    spec, case = json.loads(path.read_text()), load_case(path)
    scheduler = spec["config"]["action_scheduler"] | {"infer_shift": 2.0}
    shifted = load_case(rewrite(path, case.outputs, config=spec["config"] | {"action_scheduler": scheduler}))
    (stage,) = [stage for stage in fast_wam.prepare(shifted).stages if stage.outputs[0].startswith("infer_action_4steps")]
    ours, u = stage.run(), 1 - 1 / 4
    step = 2 * u / (1 + u) - 1
    torch.testing.assert_close(ours["infer_action_4steps/action_steps"][0], case.inputs["infer/noise_action"] + step * ours["infer_action_4steps/action_velocity_step0"])


def test_what_a_description_leaves_open_is_refused_and_the_rest_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Video that is stopped early: calls without a cache are computed, chunks say why they are not."""
    path = copy("lingbot", tmp_path)
    outputs = {name: x for name, x in load_case(path).outputs.items() if name in ("single/action_velocity", "chunk0/video", "chunk0/action")}
    rewrite(path, outputs, job=json.loads(path.read_text())["job"] | {"video_exec_step": 3})
    with pytest.raises(ConformanceError, match="0 of 1 cases, 1 of 3 outputs"):
        conformance([path])
    assert capsys.readouterr().out.count("job.video_exec_step is 3") == 2


# ------------------------------------------------------------------------------------------------ files that stand alone, or are no case


def released_schedules() -> dict[str, Any]:
    """The released numbers as the release's own JSON lays them out."""
    numbers = json.loads((CASES.parent / "data" / "schedules.json").read_text())
    dreamzero, fast, lingbot_va = numbers["dreamzero"], numbers["fast_wam"], numbers["lingbot_va"]
    inference = {"steps": dreamzero["unipc"]["steps"], "dit_step_masks": dreamzero["evaluated_of_16"], "decoupled_video_sigmas": dreamzero["decoupled"]["steps"]}
    probe = {"description": "sin(3x) + (t/1000) x - 0.25", "x0": dreamzero["probe"]["x0"], "trajectory": dreamzero["probe"]["trajectory"]}
    training = {"shift": fast["shift"], "y_min": fast["y_min"], "weight_norm_const": fast["mean"], "probe_u": fast["u"], "probe_t": fast["timesteps"], "probe_weight": fast["weights"]}
    inference["decoupled_note"] = f"video_inference_final_noise={dreamzero['decoupled']['final']}"
    systems = {"dreamzero": {"inference": inference, "unipc_probe": probe}, "fastwam": {"training": training, "inference": {"steps": fast["euler"]}}, "lingbot": lingbot_va}
    return {"format": "golden-v1", "note": "of the released systems"} | systems


def test_schedules_are_checked_number_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, tree = tmp_path / "schedules.json", released_schedules()
    path.write_text(json.dumps(tree))
    (result,) = conformance([path])
    assert len(result.lines) > 30 and {line.output.split("/")[0] for line in result.lines} == {"dreamzero", "fastwam", "lingbot"}
    tree["dreamzero"]["inference"]["dit_step_masks"]["8"][3] += 1
    tree["fastwam"]["inference"]["steps"]["4"]["entropy"] = [1.0]
    tree["fastwam"]["distillation"] = {"sigmas": [1.0]}
    path.write_text(json.dumps(tree))
    with pytest.raises(ConformanceError, match=f"0 of 1 cases, {len(result.lines) - 1} of {len(result.lines) + 2} outputs"):
        conformance([path])
    assert "no stage computes this output" in capsys.readouterr().out


def test_a_list_of_tensors_must_fill_every_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    tree = json.loads((CASES.parent / "data" / "dreamzero_keys_5b.json").read_text())
    path.write_text(json.dumps(tree))
    (result,) = conformance([path])
    assert len(result.lines) == 4
    del tree["action_head.model.blocks.7.ffn.0.bias"]
    tree["action_head.vae.model.conv1.weight"] = [1, 2]
    tree["action_head.critic.weight"] = [3]
    path.write_text(json.dumps(tree))
    with pytest.raises(ConformanceError, match="0 of 1 cases, 2 of 5 outputs"):
        conformance([path])
    said = capsys.readouterr().out
    assert "'action_head.model.blocks.7.ffn.0.bias' is missing" in said and "'action_head.vae.model.conv1.weight' has shape [1, 2]" in said


def test_one_that_cannot_be_computed_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, odd, broken = copy("fastwam_base", tmp_path), tmp_path / "odd.json", tmp_path / "broken.json"
    rewrite(whole, {"infer_action_4steps/action": load_case(whole).outputs["infer_action_4steps/action"]})
    odd.write_text('{"name": "a package"}')
    broken.write_text(whole.read_text())
    listed = [str(odd), str(tmp_path / "nothing.json"), str(broken), str(whole)]
    assert main(["conformance", *listed, "--json", str(tmp_path / "out.json")]) == 2
    said = capsys.readouterr()
    for line in ("odd: FAIL  ", "nothing: FAIL  ", "broken: FAIL  "):
        assert said.out.count(line) == 1
    assert "not a conformance case" in said.out and "broken.safetensors is missing" in said.out and "1 of 4 cases, 1 of 1 outputs" in said.err
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [bool(case["refused"]) for case in cases] == [True, True, True, False] and cases[3]["passed"]


# ------------------------------------------------------------------------------------------------ slots


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
