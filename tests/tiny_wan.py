"""Tiny random Wan models of every released form, written in diffusers' layout as the real ones are downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import ByT5Tokenizer, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from wam.config import Config, load_config

# heads, head_dim, layers, ffn, channels of the latents, stride of the VAE
SIZE = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, ffn_dim=64, num_layers=2, freq_dim=32, text_dim=16)
FORMS = {
    "t2v": dict(SIZE, in_channels=4, out_channels=4),
    "i2v": dict(SIZE, in_channels=12, out_channels=4, image_dim=32, added_kv_proj_dim=48),
    "ti2v": dict(SIZE, in_channels=6, out_channels=6),
}
VAES = {
    4: dict(base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1),
    6: dict(base_dim=4, decoder_base_dim=6, z_dim=6, dim_mult=[1, 2, 2, 2], num_res_blocks=1, is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16),
}
OF_FORM = {
    "t2v": ("codec.channels=4", "codec.patch=8"),
    "i2v": ("codec.channels=4", "codec.patch=8", "model.first_frame=concat", "model.image_dim=32"),
    "ti2v": ("codec.channels=6", "codec.patch=16"),
}
COMMON = ("model.layers=2", "model.heads=2", "model.head_dim=24", "model.ffn_dim=64", "model.freq_dim=32", "text.width=16", "codec.image_size=[64, 64]")


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Random weights everywhere: what starts at zero would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            deviation = 0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, deviation, generator=generator)


def transformer(form: str, seed: int = 0, **changes: object) -> WanTransformer3DModel:
    """A transformer of one of `FORMS`."""
    model = WanTransformer3DModel(**{**FORMS[form], **changes})
    randomise(model, seed)
    return model


def write_pipeline(folder: Path, form: str, shards: str = "60KB") -> Path:
    """A folder with `transformer/` (in several shards), `vae/`, `text_encoder/` and `tokenizer/`, and `image_encoder/` for i2v."""
    torch.manual_seed(0)
    transformer(form).save_pretrained(folder / "transformer", max_shard_size=shards)
    channels = int(FORMS[form]["out_channels"])  # type: ignore[call-overload]
    statistics = dict(latents_mean=[0.1 * c - 0.2 for c in range(channels)], latents_std=[0.5 + 0.3 * c for c in range(channels)])
    AutoencoderKLWan(temperal_downsample=[False, True, True], **statistics, **VAES[channels]).save_pretrained(folder / "vae")
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0, tie_word_embeddings=False))
    encoder.save_pretrained(folder / "text_encoder")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    if form == "i2v":
        clip = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=28)
        CLIPVisionModel(clip).save_pretrained(folder / "image_encoder")
    return folder


def wan_config(form: str, folder: Path | str | None = None, *overrides: str) -> Config:
    """The config that fits a form; with a folder, everything pretrained comes from it."""
    pretrained = () if folder is None else (f"model.pretrained={folder}", "codec.kind=wan", f"codec.pretrained={folder}", "text.kind=umt5", "text.dtype=float32", f"text.pretrained={folder}")
    image = (f"image.pretrained={folder}", "image.kind=clip") if folder is not None and form == "i2v" else ()
    return load_config(None, (*COMMON, *OF_FORM[form], *pretrained, *image, *overrides))
