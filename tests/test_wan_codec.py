"""Wan's codec on tiny real VAEs of both kinds: diffusers' numbers, streams equal to one shot and apart from each other, causal, strict."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from torch import Tensor, nn

from wam.codec.wan import WanCodec

WAN21 = dict(base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
WAN22 = dict(base_dim=4, decoder_base_dim=6, z_dim=6, dim_mult=[1, 2, 2, 2], num_res_blocks=1, is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16)
KINDS = {"wan21": WAN21, "wan22": WAN22}


@pytest.fixture(scope="module", params=KINDS)
def codec(request: pytest.FixtureRequest) -> WanCodec:
    return _codec(request.param)


def _codec(kind: str) -> WanCodec:
    """Random weights, also where layers start at zero; statistics that a mistake in standardising would show."""
    torch.manual_seed(0)
    channels = KINDS[kind]["z_dim"]
    statistics = dict(latents_mean=[0.1 * c - 0.2 for c in range(channels)], latents_std=[0.5 + 0.3 * c for c in range(channels)])
    vae = AutoencoderKLWan(temperal_downsample=[False, True, True], **statistics, **KINDS[kind])
    for name, parameter in vae.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.05)
    return WanCodec(vae)


def _video(frames: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, frames, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _pixels(frames: Tensor) -> Tensor:
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def test_latents_and_frames_are_diffusers_own(codec: WanCodec) -> None:
    video = _video(9)
    mode = codec.vae.encode(_pixels(video)).latent_dist.mode()
    latents = codec.encode(video)
    assert latents.shape == (2, codec.channels, 3, 32 // codec.patch, 48 // codec.patch)
    torch.testing.assert_close(latents, (mode - codec.mean) / codec.std, atol=1e-5, rtol=0)
    decoded = codec.vae.decode(mode).sample
    torch.testing.assert_close(_pixels(codec.decode(latents)), decoded, atol=1 / 255 + 1e-5, rtol=0)  # half a grey level, in [-1, 1]
    assert float(decoded.std()) > 0.05


@pytest.mark.parametrize("sizes", [(1, 4, 4, 4), (5, 8), (13,)])
def test_an_encoder_stream_equals_one_shot(codec: WanCodec, sizes: tuple[int, ...]) -> None:
    video, stream = _video(13), codec.stream()
    parts = [stream.encode(part) for part in video.split(sizes, dim=1)]
    reference = codec.vae.encode(_pixels(video)).latent_dist.mode()
    torch.testing.assert_close(torch.cat(parts, dim=2), (reference - codec.mean) / codec.std, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [(1, 1, 2), (3, 1)])
def test_a_decoder_stream_equals_one_shot(codec: WanCodec, sizes: tuple[int, ...]) -> None:
    latents, stream = torch.randn(2, codec.channels, 4, 2, 3, generator=torch.Generator().manual_seed(1)), codec.stream_decoder()
    parts = [stream.decode(part) for part in latents.split(sizes, dim=2)]
    assert [p.shape[1] for p in parts] == [4 * size - 3 * (i == 0) for i, size in enumerate(sizes)]
    reference = codec.vae.decode(latents * codec.std + codec.mean).sample
    torch.testing.assert_close(_pixels(torch.cat(parts, dim=1)), reference, atol=1 / 255 + 1e-5, rtol=0)
    assert torch.equal(torch.cat(parts, dim=1), codec.decode(latents))


def test_the_past_matters_and_the_future_does_not(codec: WanCodec) -> None:
    video = _video(9)
    z = codec.encode(video)
    assert torch.equal(codec.encode(torch.cat([video[:, :5], 255 - video[:, 5:]], dim=1))[:, :, :2], z[:, :, :2])
    assert not torch.allclose(codec.encode(torch.cat([255 - video[:, :5], video[:, 5:]], dim=1))[:, :, 2], z[:, :, 2], atol=1e-3)
    frames = codec.decode(z)
    assert torch.equal(codec.decode(torch.cat([z[:, :, :2], -z[:, :, 2:]], dim=2))[:, :5], frames[:, :5])


def test_interleaved_streams_do_not_meet_and_the_module_forgets() -> None:
    for kind in KINDS:
        codec, videos = _codec(kind), (_video(9, seed=1), _video(9, seed=2))
        streams = [codec.stream() for _ in videos]
        parts = [[s.encode(v[:, :5]) for s, v in zip(streams, videos, strict=True)], [s.encode(v[:, 5:]) for s, v in zip(streams, videos, strict=True)]]
        for i, video in enumerate(videos):
            assert torch.equal(torch.cat([p[i] for p in parts], dim=2), codec.encode(video))
        latents = [codec.encode(video) for video in videos]
        decoders = [codec.stream_decoder() for _ in videos]
        frames = [[d.decode(z[:, :, :1]) for d, z in zip(decoders, latents, strict=True)], [d.decode(z[:, :, 1:]) for d, z in zip(decoders, latents, strict=True)]]
        for i, z in enumerate(latents):
            assert torch.equal(torch.cat([f[i] for f in frames], dim=1), codec.decode(z))
        assert not [name for name in vars(codec.vae) if "feat_map" in name], "diffusers' hidden cache was used"


def test_selected_rows_go_on_as_they_would_alone(codec: WanCodec) -> None:
    video = _video(9, batch=3)
    stream, decoder = codec.stream(), codec.stream_decoder()
    z = stream.encode(video[:, :5])
    decoder.decode(z)
    rest, alone = stream.select([2, 0]).encode(video[[2, 0], 5:]), codec.encode(video[2:])
    torch.testing.assert_close(rest[:1], alone[:, :, 2:], atol=1e-5, rtol=0)
    chosen = decoder.select([2]).decode(alone[:, :, 2:])
    assert (chosen.int() - codec.decode(alone)[:, 5:].int()).abs().max() <= 1  # batches round differently
    torch.testing.assert_close(stream.encode(video[:, 5:])[[2, 0]], rest, atol=1e-5, rtol=0)  # the first stream was left alone


def test_a_stretch_without_its_past_is_taken_as_standing_still_before_it(codec: WanCodec) -> None:
    video = _video(8)
    still = torch.cat([video[:, :1], video], dim=1)
    z = codec.encode(video, first=False)
    assert torch.equal(z, codec.encode(still)[:, :, 1:])
    assert codec.decode(z, first=False).shape == video.shape


def test_views_side_by_side_are_encoded_each_by_itself(codec: WanCodec) -> None:
    several = WanCodec(codec.vae, views=3)
    views = [_video(9, seed=seed) for seed in range(3)]
    canvas = torch.cat(views, dim=3)
    latents = several.encode(canvas)
    torch.testing.assert_close(latents, torch.cat([codec.encode(view) for view in views], dim=-1))
    assert not torch.allclose(latents, codec.encode(canvas), atol=1e-3), "on one canvas, views bleed over their edges"
    stream = several.stream()
    parts = [stream.encode(canvas[:, :1])]
    parts.append(stream.select([1]).encode(canvas[1:, 1:]))
    torch.testing.assert_close(torch.cat([parts[0][1:], parts[1]], dim=2), latents[1:])
    torch.testing.assert_close(several.decode(latents).float(), torch.cat([codec.decode(codec.encode(view)) for view in views], dim=3).float(), atol=1, rtol=0)
    torch.testing.assert_close(several.encode_pixels(canvas.float()), latents)


def test_saved_and_loaded_it_encodes_the_same(codec: WanCodec, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path)
    loaded = WanCodec.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(_video(5)), codec.encode(_video(5)))
    assert (loaded.patch, loaded.channels) == (codec.patch, codec.channels) and not any(p.requires_grad for p in loaded.parameters())
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="diffusers' layout"):
        WanCodec.from_pretrained(tmp_path)


def test_half_precision_stays_near(codec: WanCodec, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path)
    half = WanCodec.from_pretrained(tmp_path, dtype=torch.bfloat16)
    z = half.encode(_video(5))
    assert z.dtype == torch.float32 and half.mean.dtype == torch.float32
    torch.testing.assert_close(z, codec.encode(_video(5)), atol=0.1, rtol=0)


def test_frames_that_do_not_fit_are_refused(codec: WanCodec) -> None:
    with pytest.raises(ValueError, match=r"1 \+ 4k .*\(8 = 1 \+ 4 x 1 \+ 3\)"):
        codec.encode(_video(8))
    with pytest.raises(ValueError, match="0 frames"):
        codec.encode(_video(0))
    with pytest.raises(ValueError, match=r"5 = 4 x 1 \+ 1"):
        codec.encode(_video(5), first=False)
    stream = codec.stream()
    stream.encode(_video(1))
    with pytest.raises(ValueError, match=r"4k, k >= 1"):
        stream.encode(_video(0))
    with pytest.raises(ValueError, match=r"batch, height, width \(2, 32, 48\), but \(3, 32, 48\)"):
        stream.encode(_video(4, batch=3))
    with pytest.raises(ValueError, match=r"expected uint8"):
        codec.encode(_video(5).float())
    height, patch = codec.patch * 5 // 2, codec.patch
    with pytest.raises(ValueError, match=rf"{height} pixels high.*stride {patch}.*= 2 x {patch} \+ {patch // 2}.*to {2 * patch} or {3 * patch}"):
        codec.encode(torch.zeros(1, 1, height, 48, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"latents have the shape \(1, 9, 1, 2, 3\)"):
        codec.decode(torch.zeros(1, 9, 1, 2, 3))


def test_a_refused_call_leaves_a_stream_usable(codec: WanCodec) -> None:
    video, stream = _video(5), codec.stream()
    with pytest.raises(ValueError, match="do not fit"):
        stream.encode(video[:, :3])
    assert torch.equal(stream.encode(video), codec.encode(video))


def test_vaes_that_fold_another_number_of_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="folds 2 frames"):
        WanCodec(AutoencoderKLWan(temperal_downsample=[False, False, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4, **WAN21))
    with pytest.raises(ValueError, match="16 entries for z_dim 4"):
        WanCodec(AutoencoderKLWan(temperal_downsample=[False, True, True], **WAN21))


def test_the_pixel_folding_is_the_one_of_wan22() -> None:
    x = torch.arange(2 * 2 * 3).view(1, 3, 1, 2, 2)
    assert patchify(x, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]
