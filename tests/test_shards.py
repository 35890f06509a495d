"""Checkpoints on disk: what is written is read back, and what is broken is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from wam.shards import MemorySource, ShardReader, ShardWriter, build_empty, identity, identity_of, load_into

TENSORS = {f"layer.{i}.weight": torch.arange(100.0).reshape(10, 10) + i for i in range(5)} | {"scale": torch.tensor(2.0, dtype=torch.bfloat16)}


def write(directory: Path, max_bytes: float = 900, name: str = "model") -> Path:
    with ShardWriter(directory, name, max_bytes) as writer:
        for key, tensor in TENSORS.items():
            writer.add(key, tensor)
    return directory


def test_shards_hold_what_was_written(tmp_path: Path) -> None:
    write(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "model.safetensors.index.json"]
    with ShardReader(tmp_path) as reader:
        assert sorted(reader.names()) == sorted(TENSORS)
        for name, tensor in TENSORS.items():
            assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == tensor.dtype
            assert torch.equal(reader.get(name), tensor)
    write(tmp_path, max_bytes=1e9)  # again, into one shard: nothing of the old ones stays
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items())


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'a' is written twice"), ShardWriter(tmp_path, max_bytes=8) as writer:
        for name in ("a", "b", "a"):
            writer.add(name, torch.zeros(2))
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_tensor_is_written_alone(tmp_path: Path) -> None:
    whole = torch.arange(30.0).reshape(6, 5)
    with ShardWriter(tmp_path) as writer:
        for i, part in enumerate(whole.chunk(3)):
            writer.add(str(i), part)
    assert torch.equal(torch.cat([ShardReader(tmp_path).get(str(i)) for i in range(3)]), whole)


def test_pickles_are_read_and_never_run(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "step": 7}, tmp_path / "old.pth")
    reader = ShardReader(tmp_path / "old.pth")
    assert reader.extras == {"step": 7} and torch.equal(reader.get("model.layer.3.weight"), TENSORS["layer.3.weight"])
    torch.save({"a": torch.zeros(1), "b": nn.Linear(1, 1)}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"code\.pt holds more than tensors .* is not run"):
        ShardReader(tmp_path / "code.pt")
    data = (tmp_path / "old.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.pth cannot be read .* cut short or damaged"):
        ShardReader(tmp_path / "cut.pth")


def test_a_shard_cut_short_is_named_with_its_bytes(tmp_path: Path) -> None:
    shard = write(tmp_path) / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=rf"model-00002-of-00003\.safetensors is cut short: expected {len(data):,} bytes, found {len(data) - 100:,}"):
        ShardReader(tmp_path)
    shard.write_bytes(data[:20])
    with pytest.raises(ValueError, match=r"model-00002.* is cut short: its header alone needs"):
        ShardReader(tmp_path)
    shard.write_bytes(b"<html>not found, but with the status of a page that was</html>")
    with pytest.raises(ValueError, match=r"model-00002.* is not a safetensors file"):
        ShardReader(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"index model\.safetensors\.index\.json is missing"):
        ShardReader(tmp_path)
    index.write_text(text)
    (tmp_path / "model-00003-of-00003.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"model-00003-of-00003\.safetensors is missing"):
        ShardReader(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "model-00003-of-00003.safetensors")

    tree = json.loads(text)
    index.write_text(json.dumps({"weight_map": tree["weight_map"] | {"ghost": "model-00001-of-00003.safetensors"}}))
    with pytest.raises(ValueError, match=r"lists tensor 'ghost' in model-00001-of-00003\.safetensors, which does not hold it"):
        ShardReader(tmp_path)
    index.write_text(json.dumps({"weight_map": {name: file for name, file in tree["weight_map"].items() if name != "scale"}}))
    with pytest.raises(ValueError, match=r"holds tensor 'scale', which .* does not list"):
        ShardReader(tmp_path)
    index.write_text(json.dumps({"weight_map": {"scale": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="expected names of files beside it"):
        ShardReader(tmp_path)
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        ShardReader(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        ShardReader(tmp_path / "nowhere")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    index.unlink()
    for shard in tmp_path.glob("model-*"):
        shard.rename(tmp_path / shard.name.replace("model-0000", "part").replace("-of-00003", ""))
    with pytest.raises(ValueError, match="several checkpoints: other"):
        ShardReader(tmp_path)
    assert ShardReader(tmp_path, name="other").names() == ["a"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.b = nn.Linear(3, 2)
        self.b.weight = self.a.weight
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def test_an_empty_module_is_filled() -> None:
    torch.manual_seed(0)
    full = Tied()
    source = MemorySource({f"net.{name}": tensor for name, tensor in full.state_dict().items() if name != "b.weight"} | {"codec.x": torch.zeros(1)})
    empty = build_empty(Tied)
    assert empty.a.weight.is_meta and not empty.table.is_meta
    load_into(empty, source, lambda name: name.removeprefix("net.") if name.startswith("net.") else None)
    assert all(torch.equal(tensor, empty.state_dict()[name]) for name, tensor in full.state_dict().items())
    assert empty.b.weight is empty.a.weight and torch.equal(empty.table, full.table)

    state = dict(full.state_dict())
    for change, message in (
        ({"c.weight": torch.zeros(1)}, r"unexpected tensors for Tied, e\.g\. 'c\.weight' \[1\]"),
        ({"a.bias": torch.zeros(5)}, r"tensor 'a\.bias' has shape \[5\], expected \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_into(build_empty(Tied), MemorySource(state | change))
    del state["b.bias"]
    with pytest.raises(ValueError, match=r"lacks 1 tensors of Tied, e\.g\. 'b\.bias' \[2\]"):
        load_into(build_empty(Tied), MemorySource(state))


def test_identity_tells_weights_apart_and_not_how_they_are_stored(tmp_path: Path) -> None:
    own = identity(TENSORS.items())
    assert own == identity(reversed(TENSORS.items())) == identity_of(ShardReader(write(tmp_path)))
    precise = {name: tensor.double() * (1 + 1e-7) for name, tensor in TENSORS.items()}
    assert own == identity(precise.items()) == identity((name, tensor.bfloat16()) for name, tensor in precise.items())
    for change in ({"scale": torch.tensor(3.0)}, {"layer.0.weight": TENSORS["layer.0.weight"].reshape(4, 25)}, {"more": torch.zeros(1)}):
        assert identity((TENSORS | change).items()) != own
    assert identity_of(MemorySource(TENSORS), lambda name: None if name == "scale" else name) != own
