"""Adapters on the backbone: begin as the backbone, train alone, merge to rounding, and belong to the weights they were trained on."""

import builtins
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_wan import FORMS, randomise
from torch import Tensor, nn

from wam.config import LoraConfig
from wam.model.backbone import Backbone
from wam.model.lora import apply_lora, base_identity, has_lora, is_adapter, load_adapter, merge_lora, save_adapter, trainable

LORA = LoraConfig(rank=3, alpha=6.0)


class Model(nn.Module):
    """A backbone and one part that is not."""

    def __init__(self, form: str = "t2v", seed: int = 0):
        super().__init__()
        self.backbone = Backbone(**FORMS[form])
        randomise(self.backbone, seed)
        self.head = nn.Linear(3, 3)


def _output(model: Model) -> Tensor:
    """All the linear layers that adapters may sit on, one block after another."""
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1)).to(model.backbone.patch_embedding.weight.dtype)
    for block in model.backbone.blocks:
        x = block.attn1.to_out[0](block.attn1.to_q(x) + block.attn1.to_k(x).sin() * block.attn2.to_v(x).cos())
        x = block.ffn(block.norm1(x))
    return x


def _trained(seed: int = 0) -> Model:
    model = Model(seed=seed)
    apply_lora(model, LORA)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.backbone.named_parameters():
        if is_adapter(name):
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


def test_adapting_begins_with_the_backbone_as_it_is() -> None:
    model = Model()
    before, identity = _output(model), base_identity(model)
    apply_lora(model, LORA)
    assert torch.equal(_output(model), before) and base_identity(model) == identity and has_lora(model)
    torch.nn.init.normal_(model.backbone.blocks[0].attn1.to_q.lora_B["default"].weight)
    assert not torch.allclose(_output(model), before, atol=1e-3)


def test_the_backbone_is_frozen_and_the_rest_trains_in_full() -> None:
    model = Model("i2v")
    apply_lora(model, LORA, also=["condition_embedder.image_embedder.norm1.weight"])
    names = set(trainable(model))
    adapters = {name for name in names if is_adapter(name)}
    assert len(adapters) == 2 * 2 * (2 * 4 + 2)  # A and B, two blocks, q k v o of two attentions and two feed-forward layers
    assert names - adapters == {"head.weight", "head.bias", "backbone.condition_embedder.image_embedder.norm1.weight"}
    _output(model).square().sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n not in names)


def test_alpha_over_rank_scales_the_update() -> None:
    model, x = _trained(), torch.randn(4, 48)
    layer = model.backbone.blocks[1].attn1.to_k
    low = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 2.0 * low)


def test_merging_is_exact_to_rounding_and_leaves_a_plain_backbone() -> None:
    model = _trained()
    adapted = _output(model)
    merge_lora(model)
    torch.testing.assert_close(_output(model), adapted, atol=1e-5, rtol=1e-5)
    assert list(model.backbone.state_dict()) == list(Backbone(**FORMS["t2v"]).state_dict()) and not has_lora(model)
    assert all(p.requires_grad for p in model.parameters())
    apply_lora(model, LORA)  # and can be adapted again


def test_adapters_of_a_bfloat16_backbone_are_float32() -> None:
    model = Model()
    identity = base_identity(model)
    model.backbone.to(torch.bfloat16)
    apply_lora(model, LORA)
    dtypes = {is_adapter(n): p.dtype for n, p in model.backbone.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16} and base_identity(model) == identity
    merge_lora(model)
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}


def _saved(model: Model, folder: Path) -> None:
    tensors = {n: p for n, p in model.backbone.named_parameters() if is_adapter(n)}
    save_adapter(folder, tensors, LORA, base_identity(model), "some/base")


def test_adapters_come_back_to_the_bit(tmp_path: Path) -> None:
    model, other = _trained(), Model()
    _saved(model, tmp_path)
    apply_lora(other, LORA)
    load_adapter(other, tmp_path)
    assert torch.equal(_output(other), _output(model))


def test_another_base_is_refused_with_both_hashes(tmp_path: Path) -> None:
    model, other = _trained(), Model(seed=1)
    _saved(model, tmp_path)
    apply_lora(other, LORA)
    with pytest.raises(ValueError, match=f"expected sha256 {base_identity(model)}, found {base_identity(other)}; .*some/base"):
        load_adapter(other, tmp_path)


def test_other_ranks_and_damage_are_refused(tmp_path: Path) -> None:
    model, other = _trained(), Model()
    _saved(model, tmp_path)
    apply_lora(other, LoraConfig(rank=5))
    with pytest.raises(ValueError, match=r"does not fit model.lora: .*\(3, 48\), expected \(5, 48\)"):
        load_adapter(other, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_adapter(model, tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(model, tmp_path)


def test_unknown_targets_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"names 'to_qq', but no linear layer .* there are .*to_k.*to_out"):
        apply_lora(Model(), LoraConfig(targets=("to_qq",)))
    model = Model()
    apply_lora(model, LORA)
    with pytest.raises(ValueError, match="has adapters already"):
        apply_lora(model, LORA)
    real = builtins.__import__

    def without_peft(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "peft":
            raise ModuleNotFoundError("No module named 'peft'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'wam\[lora\]'"):
        apply_lora(SimpleNamespace(backbone=Model().backbone), LORA)
