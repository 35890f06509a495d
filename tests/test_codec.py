"""The linear codec: causal, streaming equals one shot, refuses what does not fit."""

import pytest
import torch
from tiny import tiny_config

from wam.codec.linear import LinearCodec
from wam.config import CodecConfig


def _clip(frames: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Smooth moving blobs, which a few components can describe."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(frames)[None, :, None, None, None] / 5 + torch.rand(batch, 1, 1, 1, 3, generator=generator) * 6
    y, x = torch.arange(32)[None, None, :, None, None] / 8, torch.arange(48)[None, None, None, :, None] / 8
    return ((torch.sin(t + y) * torch.cos(x - t) + 1) * 127.5).to(torch.uint8)


def _fitted(channels: int = 6) -> LinearCodec:
    codec = LinearCodec(tiny_config(f"codec.channels={channels}").codec)
    codec.fit(_clip(32, batch=8).unflatten(1, (-1, 4)).flatten(0, 1))
    return codec


def test_a_stream_equals_one_shot() -> None:
    codec, video = _fitted(), _clip(13)
    stream = codec.stream()
    parts = [stream.encode(video[:, :5]), stream.encode(video[:, 5:9]), stream.encode(video[:, 9:])]
    assert torch.equal(torch.cat(parts, dim=2), codec.encode(video))


def test_a_decoder_stream_equals_one_shot_and_rows_go_on_alone() -> None:
    codec, video = _fitted(), _clip(13)
    latents = codec.encode(video)
    stream, encoder = codec.stream_decoder(), codec.stream()
    first = stream.decode(latents[:, :, :2])
    encoder.encode(video[:, :5])
    alone, ahead = stream.select([1]), encoder.select([1])
    assert torch.equal(torch.cat([first[1:], alone.decode(latents[1:, :, 2:])], dim=1), codec.decode(latents)[1:])
    assert torch.equal(ahead.encode(video[1:, 5:]), latents[1:, :, 2:])
    assert torch.equal(stream.decode(latents[:, :, 2:]), codec.decode(latents)[:, 5:])


def test_the_future_does_not_change_what_was_encoded() -> None:
    codec, video = _fitted(), _clip(9)
    changed = video.clone()
    changed[:, 5:] = 0
    assert torch.equal(codec.encode(video)[:, :, :2], codec.encode(changed)[:, :, :2])


def test_decoding_undoes_encoding_as_far_as_the_channels_reach() -> None:
    video = _clip(9, seed=3)
    few, many = (_fitted(c) for c in (2, 24))
    error = [float((c.decode(c.encode(video)).float() - video.float()).square().mean()) for c in (few, many)]
    assert few.decode(few.encode(video)).shape == video.shape
    assert error[1] < 4 < error[0]


def test_latents_are_standardised() -> None:
    z = _fitted().encode(_clip(33, batch=8))
    assert z.shape == (8, 6, 9, 4, 6)
    assert 0.5 < float(z.std()) < 1.5


@pytest.mark.parametrize(("frames", "text"), [(4, r"1 \+ 4k"), (8, r"8 = 1 \+ 4 x 2")])
def test_frames_that_are_not_one_plus_four_k_are_refused(frames: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _fitted().encode(_clip(frames))


def test_another_image_size_is_refused() -> None:
    with pytest.raises(ValueError, match="frames are 64x64, but this codec encodes 32x48"):
        _fitted().encode(torch.zeros(1, 5, 64, 64, 3, dtype=torch.uint8))


def test_more_channels_than_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="192 numbers"):
        CodecConfig(channels=200)
