"""Every attention backend against the products written out in float64, masked or not; what a backend cannot do, it says."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from wam.model.attention import TILE, attention, block_mask
from wam.relations import MODES
from wam.timeline import Kind

HEADS = 3
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # on a CPU, as it is meant to be


def tensors(batch: int, queries: int, keys: int, dim: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, length, HEADS, dim, generator=generator, dtype=torch.float64) for length in (queries, keys, keys)]


def random_mask(*shape: int) -> Tensor:
    """Every query sees key 0, and half of the others."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = True
    return mask


def window_mask() -> Tensor:
    """The relations of a training window of three blocks, each a frame of 180 patches, a state and 24 actions: 11 tiles by 11."""
    counts = {Kind.VC: 180, Kind.V: 180, Kind.S: 1, Kind.AC: 24, Kind.A: 24}
    pairs = [(Kind.H, -1, 180), *((kind, block, tokens) for (kind, tokens), block in itertools.product(counts.items(), range(3)))]
    kinds, blocks = (torch.cat([torch.full((tokens,), int(x[at])) for x in pairs for tokens in x[2:]]) for at in (0, 1))
    return MODES["joint"].table.mask(kinds, blocks, kinds, blocks)


def run(inputs: list[Tensor], mask: object, backend: str, gradients: bool = True) -> list[Tensor]:
    """The output and the three gradients, in float64 on the CPU."""
    inputs = [x.detach().clone().requires_grad_(gradients) for x in inputs]
    out = attention(*inputs, mask, backend)
    if gradients:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        (out * weight.to(out)).sum().backward()
    return [x.double().cpu() for x in (out.detach(), *(x.grad for x in inputs if gradients))]


def written_out(inputs: list[Tensor], mask: Tensor | None) -> Tensor:
    """One query of one head at a time, over only the keys that it may see: nothing in common with how any backend masks."""
    q, k, v = inputs
    out = torch.zeros_like(q)
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask
    seen = seen.expand(len(q), HEADS, q.shape[1], k.shape[1])
    for b, h, i in itertools.product(range(len(q)), range(HEADS), range(q.shape[1])):
        keys = seen[b, h, i]
        out[b, i, h] = (k[b, keys, h] @ q[b, i, h] / q.shape[-1] ** 0.5).softmax(0) @ v[b, keys, h]
    return out


MASKS = {
    "none": lambda batch, queries, keys: None,
    "shared": lambda batch, queries, keys: random_mask(queries, keys),
    "sample": lambda batch, queries, keys: random_mask(batch, 1, queries, keys),
    "padding": lambda batch, queries, keys: random_mask(batch, 1, 1, keys),
    "head": lambda batch, queries, keys: random_mask(1, HEADS, queries, keys),
}
forms = pytest.mark.parametrize("mask", MASKS)
batches = pytest.mark.parametrize("batch", [1, 3])
lengths = pytest.mark.parametrize("queries,keys", [(17, 17), (5, 19)])


@forms
@batches
@lengths
def test_eager_is_softmax_attention(mask: str, batch: int, queries: int, keys: int) -> None:
    inputs, seen = tensors(batch, queries, keys), MASKS[mask](batch, queries, keys)
    torch.testing.assert_close(attention(*inputs, seen, "eager"), written_out(inputs, seen))


@forms
@batches
@lengths
@pytest.mark.parametrize("backend,dtype,tolerance", [("sdpa", torch.float64, 1e-12), ("sdpa", torch.float32, 1e-5), ("eager", torch.float32, 1e-5), ("eager", torch.bfloat16, 4e-2), ("sdpa", torch.bfloat16, 4e-2)])
def test_values_and_gradients_on_cpu(backend: str, dtype: torch.dtype, tolerance: float, mask: str, batch: int, queries: int, keys: int) -> None:
    inputs = [x.to(dtype) for x in tensors(batch, queries, keys)]
    seen = MASKS[mask](batch, queries, keys)
    torch.testing.assert_close(run(inputs, seen, backend), run([x.double() for x in inputs], seen, "eager"), atol=tolerance, rtol=tolerance)


@forms
@batches
@lengths
def test_flex_equals_eager_on_cpu(mask: str, batch: int, queries: int, keys: int) -> None:
    inputs, seen = [x.float() for x in tensors(batch, queries, keys)], MASKS[mask](batch, queries, keys)
    torch.testing.assert_close(run(inputs, seen, "flex", gradients=False), run(inputs, seen, "eager", gradients=False), atol=1e-5, rtol=1e-5)


def test_block_mask_is_the_dense_mask() -> None:
    """Tile by tile as `create_block_mask` finds them from a predicate, and with the same answer."""
    dense = torch.stack([window_mask(), random_mask(*window_mask().shape)]).unsqueeze(1)
    batch, _, queries, keys = dense.shape
    ours = block_mask(dense)
    theirs = create_block_mask(lambda b, h, q, k: dense[b, 0, q, k], batch, None, queries, keys, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert (ours.full_kv_num_blocks > 0).any() and (ours.to_dense() == 0).any() and queries % TILE != 0  # the case has tiles of every sort

    inputs = [x.float() for x in tensors(batch, queries, keys)]
    for mask in (ours, theirs):
        torch.testing.assert_close(attention(*inputs, mask), attention(*inputs, dense), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("has_bf16,chosen", [(True, "eager"), (False, "sdpa")])
def test_auto_writes_bf16_products_out_only_where_that_is_fast(has_bf16: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wam.model.attention._cpu_multiplies_bf16", lambda: has_bf16)
    inputs = [x.bfloat16() for x in tensors(1, 40, 40)]
    assert not torch.equal(attention(*inputs, None, "eager"), attention(*inputs, None, "sdpa"))  # they round differently
    assert torch.equal(attention(*inputs), attention(*inputs, None, chosen))


def test_layout_of_what_goes_in_does_not_matter() -> None:
    """Slices of a longer sequence, as queries and keys of a group are."""
    inputs = tensors(2, 12, 12)
    for backend in ("sdpa", "eager", "flex"):
        views = [x[:, 3:9] for x in inputs]
        torch.testing.assert_close(attention(*views, None, backend), attention(*(x.contiguous() for x in views), None, backend))


# ------------------------------------------------------------------------------------------ what a backend cannot do


def test_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown attention backend 'xformer'; did you mean 'xformers'\?"):
        attention(*tensors(1, 4, 4), None, "xformer")


@pytest.mark.parametrize("backend,package", [("xformers", "xformers.ops"), ("flash", "flash_attn")])
def test_missing_package_names_the_extra(backend: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{backend}.*pip install 'wam\[cuda\]', or use 'sdpa'"):
        attention(*tensors(1, 4, 4), None, backend)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "xformers", "flash"])
def test_block_mask_needs_flex(backend: str) -> None:
    with pytest.raises(ValueError, match=f"'{backend}' cannot take a BlockMask; use 'flex'"):
        attention(*tensors(1, 4, 4), block_mask(random_mask(4, 4)), backend)


def test_flash_takes_no_mask() -> None:
    with pytest.raises(ValueError, match="'flash' cannot take a mask; use 'flex' with a BlockMask, or 'sdpa' or 'xformers' with a dense one"):
        attention(*tensors(1, 4, 4), random_mask(4, 4), "flash")


def test_masks_are_bool() -> None:
    with pytest.raises(ValueError, match=r"torch.float64, but must be bool.*; pass mask == 0"):
        attention(*tensors(1, 4, 4), torch.zeros(4, 4, dtype=torch.float64))


def test_flex_on_a_cpu_has_no_gradients() -> None:
    with pytest.raises(ValueError, match="no gradients on a CPU; train with 'sdpa' and a dense bool mask"):
        attention(*(x.requires_grad_() for x in tensors(1, 4, 4)), block_mask(random_mask(4, 4)))


@pytest.mark.parametrize("backend", ["xformers", "flash"])
def test_cuda_backends_say_so_on_a_cpu(backend: str) -> None:
    pytest.importorskip({"xformers": "xformers.ops", "flash": "flash_attn"}[backend], reason=f"{backend} is not installed")
    with pytest.raises(ValueError, match=f"'{backend}' got torch.float64 on cpu, but computes .* on cuda; use 'sdpa'"):
        attention(*tensors(1, 4, 4), None, backend)


# ------------------------------------------------------------------------------------------ CUDA kernels, and their contracts where there is none


def fussy_kernel(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None = None, scale: float | None = None, softmax_scale: float | None = None) -> Tensor:
    """What xformers and flash-attn ask of their inputs, and compute from them."""
    assert q.shape[-1] % 8 == k.shape[-1] % 8 == v.shape[-1] % 8 == 0
    scores = torch.einsum("blhd,bshd->bhls", q, k) * (scale or softmax_scale or q.shape[-1] ** -0.5)
    if attn_bias is not None:
        assert attn_bias.shape == scores.shape and attn_bias.dtype == q.dtype and attn_bias.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
        scores = scores + attn_bias
    return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v)


@batches
@lengths
@pytest.mark.parametrize("backend,package,kernel,masks", [("xformers", "xformers.ops", "memory_efficient_attention", MASKS), ("flash", "flash_attn", "flash_attn_func", ["none"])])
def test_cuda_kernels_get_what_they_ask_for(
    backend: str, package: str, kernel: str, masks: list[str], batch: int, queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(**{kernel: fussy_kernel}))
    monkeypatch.setattr("wam.model.attention._need_cuda", lambda *_: None)
    inputs = tensors(batch, queries, keys)
    for mask in masks:
        seen = MASKS[mask](batch, queries, keys)
        torch.testing.assert_close(run(inputs, seen, backend), run(inputs, seen, "eager"))


@pytest.mark.gpu
@needs_cuda
@batches
@pytest.mark.parametrize("queries,keys", [(617, 617), (40, 301)])
@pytest.mark.parametrize("dim", [64, 20])
@pytest.mark.parametrize("backend,masks", [("sdpa", MASKS), ("eager", MASKS), ("flex", MASKS), ("xformers", MASKS), ("flash", ["none"])])
def test_values_and_gradients_on_cuda(backend: str, masks: list[str], dim: int, batch: int, queries: int, keys: int) -> None:
    if backend in ("xformers", "flash"):
        pytest.importorskip({"xformers": "xformers.ops", "flash": "flash_attn"}[backend], reason=f"{backend} is not installed")
    inputs = [x.to("cuda", torch.bfloat16) for x in tensors(batch, queries, keys, dim)]
    for mask in masks:
        seen = MASKS[mask](batch, queries, keys)
        expected = run([x.double().cpu() for x in inputs], seen, "eager")
        for found, wanted in zip(run(inputs, None if seen is None else seen.cuda(), backend), expected, strict=True):
            assert (found - wanted).norm() < 2e-2 * wanted.norm(), mask


@pytest.mark.gpu
@needs_cuda
def test_flex_skips_tiles_on_cuda_with_the_same_gradients() -> None:
    dense = window_mask()
    inputs = [x.to("cuda", torch.float32) for x in tensors(2, *dense.shape, 64)]
    expected = run([x.double().cpu() for x in inputs], dense, "eager")
    for found, wanted in zip(run(inputs, block_mask(dense.cuda()), "auto"), expected, strict=True):
        assert (found - wanted).norm() < 5e-3 * wanted.norm()  # its products may be in TF32
