"""Wan's VAEs: names of `Wan2.1_VAE.pth` and `Wan2.2_VAE.pth` to those of `diffusers.AutoencoderKLWan`; sizes are read off the tensors.

    Wan 2.1   encoder.downsamples.{i}                  a flat list of residual blocks and samplers; the decoder's is grouped by 4 here
    Wan 2.2   encoder.downsamples.{i}.downsamples.{j}  grouped already; the last of a group is its sampler

Mean and deviation of the latents are constants of the released code and not in the weights; they are known by the number of channels.
"""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKLWan

from wam.convert.keys import KeyMap, Rule
from wam.convert.report import Component, shapes
from wam.shards import TensorSource, build_empty

RESNETS = 2  # residual blocks a level in the encoder; the decoder has one more
WAN21_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
WAN21_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916)
WAN22_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
WAN22_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)
STATISTICS = {16: (WAN21_MEAN, WAN21_STD), 48: (WAN22_MEAN, WAN22_STD)}

RESIDUAL = (("residual.0.gamma", "norm1.gamma"), ("residual.2.{p}", "conv1.{p}"), ("residual.3.gamma", "norm2.gamma"), ("residual.6.{p}", "conv2.{p}"), ("shortcut.{p}", "conv_shortcut.{p}"))
SAMPLER = (("resample.1.{p}", "resample.1.{p}"), ("time_conv.{p}", "time_conv.{p}"))


def _place(source: str, target: str, parts: tuple[tuple[str, str], ...]) -> list[Rule]:
    return [Rule(f"{source}.{a}", f"{target}.{b}") for a, b in parts]


def _ends() -> list[Rule]:
    """What both VAEs share: first and last convolutions, the middle, the posterior."""
    rules = [Rule("conv1.{p}", "quant_conv.{p}"), Rule("conv2.{p}", "post_quant_conv.{p}")]
    for half in ("encoder", "decoder"):
        middle = f"{half}.mid_block"
        rules += [Rule(f"{half}.conv1.{{p}}", f"{half}.conv_in.{{p}}"), Rule(f"{half}.head.0.gamma", f"{half}.norm_out.gamma"), Rule(f"{half}.head.2.{{p}}", f"{half}.conv_out.{{p}}")]
        rules += _place(f"{half}.middle.0", f"{middle}.resnets.0", RESIDUAL) + _place(f"{half}.middle.2", f"{middle}.resnets.1", RESIDUAL)
        rules += [Rule(f"{half}.middle.1.norm.gamma", f"{middle}.attentions.0.norm.gamma")]
        rules += [Rule(f"{half}.middle.1.{layer}.{{p}}", f"{middle}.attentions.0.{layer}.{{p}}") for layer in ("to_qkv", "proj")]
    return rules


def _wan21() -> KeyMap:
    rules = _ends() + _place("encoder.downsamples.{n}", "encoder.down_blocks.{n}", RESIDUAL + SAMPLER)
    for level in range(4):
        first = level * (RESNETS + 2)
        for j in range(RESNETS + 1):
            rules += _place(f"decoder.upsamples.{first + j}", f"decoder.up_blocks.{level}.resnets.{j}", RESIDUAL)
        rules += _place(f"decoder.upsamples.{first + RESNETS + 1}", f"decoder.up_blocks.{level}.upsamplers.0", SAMPLER)
    return KeyMap(rules)


def _wan22() -> KeyMap:
    rules = _ends()
    rules += _place("encoder.downsamples.{n}.downsamples.{m}", "encoder.down_blocks.{n}.resnets.{m}", RESIDUAL)
    rules += _place(f"encoder.downsamples.{{n}}.downsamples.{RESNETS}", "encoder.down_blocks.{n}.downsampler", SAMPLER)
    rules += _place("decoder.upsamples.{n}.upsamples.{m}", "decoder.up_blocks.{n}.resnets.{m}", RESIDUAL)
    rules += _place(f"decoder.upsamples.{{n}}.upsamples.{RESNETS + 1}", "decoder.up_blocks.{n}.upsampler", SAMPLER)
    return KeyMap(rules)


WAN21, WAN22 = _wan21(), _wan22()


def vae_config(source: TensorSource, prefix: str, where: str) -> dict[str, Any]:
    """diffusers' config of a released VAE, from its shapes.

    Raises:
        ValueError: it lacks a tensor that tells a size, or its latents have a number of channels whose statistics are not known.
    """
    names = set(source.names())

    def size(name: str, axis: int) -> int:
        if prefix + name not in names:
            raise ValueError(f"{where}: tensor {prefix + name!r} is missing; expected a VAE under the names of Wan2.1_VAE.pth or Wan2.2_VAE.pth")
        return source.shape(prefix + name)[axis]

    grouped = any(name.startswith(f"{prefix}encoder.downsamples.0.downsamples.") for name in names)
    channels, base = size("conv2.weight", 0), size("encoder.conv1.weight", 0)
    if channels not in STATISTICS:
        raise ValueError(f"{where}: {prefix}conv2.weight says {channels} latent channels; expected 16 (Wan 2.1) or 48 (Wan 2.2), whose mean and deviation are known")
    mean, std = STATISTICS[channels]
    resnet = "encoder.downsamples.{}.downsamples.0.residual.2.weight" if grouped else "encoder.downsamples.{}.residual.2.weight"
    stride = 1 if grouped else RESNETS + 1
    widths = [size(resnet.format(level * stride), 0) for level in range(4)]
    sampler = f"encoder.downsamples.{{}}.downsamples.{RESNETS}.time_conv.weight" if grouped else "encoder.downsamples.{}.time_conv.weight"
    folds = [prefix + sampler.format(level if grouped else level * stride + RESNETS) in names for level in range(3)]
    config: dict[str, Any] = {"base_dim": base, "z_dim": channels, "dim_mult": [w // base for w in widths], "num_res_blocks": RESNETS, "attn_scales": [], "temperal_downsample": folds, "dropout": 0.0}
    config |= {"latents_mean": list(mean), "latents_std": list(std), "is_residual": grouped, "scale_factor_temporal": 2 ** sum(folds)}
    if grouped:
        pixels = size("encoder.conv1.weight", 1)
        config |= {"decoder_base_dim": size("decoder.head.0.gamma", 0), "in_channels": pixels, "out_channels": size("decoder.head.2.weight", 0), "patch_size": 2 if pixels == 12 else None}
    return config | {"scale_factor_spatial": 8 * (config.get("patch_size") or 1)}


def vae_component(source: TensorSource, prefix: str, where: str, referenced: str | None = None) -> Component:
    """A released VAE under `prefix`, as `vae/` in diffusers' layout."""
    config = vae_config(source, prefix, where)
    targets = shapes(build_empty(lambda: AutoencoderKLWan(**config)))
    keys = (WAN22 if config["is_residual"] else WAN21).within(prefix)
    return Component("vae", keys, targets, "vae", "diffusion_pytorch_model", {"_class_name": "AutoencoderKLWan", **config}, referenced)
