"""The conformance command: pairs are checked before they are used, every output is accounted for, and the numbers are the released ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from wam.evaluation.conformance.case import load_case
from wam.evaluation.conformance.compare import compare
from wam.evaluation.conformance.slots import Pool, pool_view, slot_view
from wam.timeline import Kind

CASES = Path(__file__).parent / "conformance"


def copy(name: str, folder: Path) -> Path:
    for suffix in (".json", ".safetensors"):
        shutil.copy(CASES / f"{name}{suffix}", folder / f"{name}{suffix}")
    return folder / f"{name}.json"


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


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
