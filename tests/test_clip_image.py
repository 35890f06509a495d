"""CLIP embeddings on a tiny random vision transformer: those of diffusers' image-to-video pipeline, and the pictures of Wan's own code."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from wam.codec.clip_image import CLIP_MEAN, CLIP_STD, ClipImage

# Pillow's weights are whole numbers, PyTorch's are float32: some pixels round to the next grey level, in each of the two passes.
GREY_LEVEL = 1 / 255 / min(CLIP_STD)


def _encoder() -> CLIPVisionModel:
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=224, patch_size=56)).eval()


def _picture(height: int, width: int) -> np.ndarray:
    """Smooth colours with hard edges and noise: what resizing filters disagree on."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([128 + 127 * np.sin(x / 9 + y / 23), 255.0 * ((x // 16 + y // 11) % 2), np.random.default_rng(0).uniform(0, 255, (height, width))], axis=-1)
    return image.astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (240, 320), (180, 320), (225, 224), (480, 270)])
def test_embeddings_are_those_of_the_pipeline(height: int, width: int) -> None:
    clip, picture = ClipImage(_encoder()), _picture(height, width)
    processor = CLIPImageProcessorPil()
    pipeline = SimpleNamespace(image_processor=processor, image_encoder=clip.encoder, _execution_device="cpu")
    with torch.no_grad():
        expected = WanImageToVideoPipeline.encode_image(pipeline, Image.fromarray(picture), device="cpu")
    found = clip(torch.from_numpy(picture)[None])
    assert found.shape == expected.shape == (1, clip.tokens, clip.width)
    apart = (clip.preprocess(torch.from_numpy(picture)[None]) - processor(Image.fromarray(picture), return_tensors="pt").pixel_values).abs()
    assert float(apart.max()) <= 2.01 * GREY_LEVEL and float(apart.mean()) < 0.02 * GREY_LEVEL
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)  # their deviation is about 1


def test_at_the_encoders_own_size_the_numbers_are_the_pipelines_to_rounding() -> None:
    clip, picture = ClipImage(_encoder()), _picture(224, 224)
    pixels = CLIPImageProcessorPil()(Image.fromarray(picture), return_tensors="pt").pixel_values
    torch.testing.assert_close(clip.preprocess(torch.from_numpy(picture)[None]), pixels, atol=1e-5, rtol=0)
    with torch.no_grad():
        expected = clip.encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(clip(torch.from_numpy(picture)[None]), expected, atol=1e-5, rtol=0)


def test_it_is_the_layer_before_the_last() -> None:
    clip, frames = ClipImage(_encoder()), torch.from_numpy(_picture(224, 224))[None]
    before = clip(frames)
    with torch.no_grad():
        for parameter in clip.encoder.get_submodule("encoder.layers.2").parameters():
            parameter.zero_()
    assert torch.equal(clip(frames), before)


def test_stretching_shows_the_whole_frame_and_cropping_its_middle() -> None:
    frame = torch.zeros(1, 224, 448, 3, dtype=torch.uint8)
    frame[:, :, :56] = 255  # a bright strip at the edge

    def bright(framing: str) -> Tensor:
        return (ClipImage(_encoder(), framing).preprocess(frame)[0, 0] * CLIP_STD[0] + CLIP_MEAN[0] > 0.5).float().mean(dim=0)

    assert float(bright("crop").sum()) == 0
    assert bright("stretch").nonzero().flatten().tolist() == list(range(28))


def test_frames_of_a_batch_are_embedded_apart() -> None:
    clip = ClipImage(_encoder())
    frames = torch.stack([torch.from_numpy(_picture(96, 128)), torch.zeros(96, 128, 3, dtype=torch.uint8)])
    torch.testing.assert_close(clip(frames)[1:], clip(frames[1:]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["", "vision_model."])  # as this and as earlier versions of transformers name the weights
def test_released_layouts_load(tmp_path: Path, prefix: str) -> None:
    encoder = _encoder()
    encoder.save_pretrained(tmp_path / "image_encoder")
    tensors = {prefix + k.removeprefix("vision_model."): v.contiguous() for k, v in encoder.state_dict().items()}
    weights = tmp_path / "image_encoder" / "model.safetensors"
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    frames = torch.from_numpy(_picture(64, 64))[None]
    assert torch.equal(ClipImage.from_pretrained(tmp_path)(frames), ClipImage(encoder)(frames))

    safetensors.torch.save_file({k: v for k, v in tensors.items() if "layers.1.mlp.fc1" not in k}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 2 weights"):
        ClipImage.from_pretrained(tmp_path)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torch.float32 \(1, 8, 8, 3\); expected uint8"):
        ClipImage(_encoder())(torch.zeros(1, 8, 8, 3))
    with pytest.raises(ValueError, match="expected one of crop, stretch"):
        ClipImage(_encoder(), "pad")
    with pytest.raises(FileNotFoundError, match="diffusers' layout"):
        ClipImage.from_pretrained(tmp_path / "nowhere")
