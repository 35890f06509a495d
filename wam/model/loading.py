"""A pretrained Wan transformer under a world action model.

    transformer/config.json                      sizes: compared with the config before anything is read
    transformer/diffusion_pytorch_model*         weights: into a model without memory, tensor by tensor, so that there is never a second copy
    action and state encoders, heads             new: from the seed, as their constructors do
    an expert                                    the video's weights, interpolated to its width
    an image branch that the backbone lacks      new: from the seed, and silent at first

Folders are in diffusers' layout, on this machine or on the Hub; or a policy's own, of which the backbone is taken (`model.backbone.*`): what
adapters are trained on where a converted or trained policy is fitted to another robot.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from wam.config import Config, load_config
from wam.model.backbone import Backbone
from wam.shards import ShardReader, build_empty, load_into

TRANSFORMER, WEIGHTS = "transformer", "diffusion_pytorch_model"
POLICY_CONFIG, POLICY_WEIGHTS, POLICY_BACKBONE = "config.yaml", "model", "model.backbone."  # a policy's config, its weights, and what the backbone's are called in them
MASK_CHANNELS = 4  # of a first frame that is joined to the channels: one per pixel frame of a latent
FIXED = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "pos_embed_seq_len": None}  # the same in every Wan that can be used here
Model = TypeVar("Model", bound=nn.Module)


# ------------------------------------------------------------------------------------------------ where it lies


def local_folder(path_or_repo: str | Path, *subfolders: str) -> Path:
    """A folder on this machine: the one that was named, or the download of a Hub repository (of these subfolders alone, where given).

    Raises:
        FileNotFoundError: neither a folder nor a repository that can be had; with the reason.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    repository = str(path_or_repo)
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder {path_or_repo}; give a folder in diffusers' layout or a Hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=[f"{name}/*" for name in subfolders] or None))
    except Exception as error:  # of the network, of the Hub, of its cache: many kinds, one remedy
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{repository} is no folder here, and cannot be had from the Hub ({type(error).__name__}: {reason}); check the name and the network, or give a folder with a download of it") from error


@dataclass(frozen=True)
class StoredBackbone:
    """A backbone on disk: a transformer in diffusers' layout, or the backbone within a policy.

    Attributes:
        arguments: what `WanTransformer3DModel` was built with, defaults included.
        weights: what its files are called.
        prefix: what the names of its tensors begin with there.
    """

    folder: Path
    arguments: dict[str, Any]
    weights: str
    prefix: str = ""

    @staticmethod
    def at(path_or_repo: str | Path) -> StoredBackbone:
        """Find it: `transformer/` of a pipeline's folder, the folder itself, or a policy's.

        Raises:
            FileNotFoundError: there is none.
            ValueError: a damaged config, another model's, or a policy that holds adapters instead of a backbone (named).
        """
        folder = local_folder(path_or_repo, TRANSFORMER)
        if (folder / POLICY_CONFIG).is_file() and not (folder / TRANSFORMER).is_dir():
            if (folder / "adapter").is_dir():
                raise ValueError(f"{folder} is a policy that holds adapters and not the backbone they belong to; merge it first (from_pretrained, then save_pretrained), or name the backbone it was trained on")
            return StoredBackbone(folder, backbone_arguments(load_config(folder / POLICY_CONFIG)), POLICY_WEIGHTS, POLICY_BACKBONE)
        for candidate in (folder / TRANSFORMER, folder):
            if (candidate / "config.json").is_file():
                return StoredBackbone(candidate, stored_arguments(candidate), WEIGHTS)
        raise FileNotFoundError(
            f"{path_or_repo} holds no {TRANSFORMER}/config.json; give a Wan model in diffusers' layout, e.g. a download of Wan-AI/Wan2.2-TI2V-5B-Diffusers, or a policy's folder"
        )

    def reader(self) -> ShardReader:
        """Its tensors, to be read when they are asked for."""
        return ShardReader(self.folder, self.weights)

    def own(self, name: str) -> str | None:
        """The backbone's name of a stored tensor; None for what is not the backbone's."""
        return name.removeprefix(self.prefix) if name.startswith(self.prefix) else None


# ------------------------------------------------------------------------------------------------ what size it has


def stored_arguments(folder: Path) -> dict[str, Any]:
    """What `WanTransformer3DModel` was built with, defaults included.

    Raises:
        ValueError: a damaged `config.json`, that of another model, or of a Wan that cannot be used here (named).
    """
    path = folder / "config.json"
    try:
        tree = json.loads(path.read_text())
        kind = tree.get("_class_name", WanTransformer3DModel.__name__)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if kind not in (WanTransformer3DModel.__name__, Backbone.__name__):
        raise ValueError(f"{path} describes a {kind}; expected a {WanTransformer3DModel.__name__}, which every Wan text-to-video, image-to-video and TI2V model has")
    parameters = list(inspect.signature(WanTransformer3DModel.__init__).parameters.values())[1:]
    arguments = {p.name: tree.get(p.name, p.default) for p in parameters}
    for name, expected in FIXED.items():
        if arguments[name] != expected:
            raise ValueError(f"{path}: {name} is {arguments[name]!r}; a world action model needs {expected!r}, as in Wan2.1 T2V and I2V and Wan2.2 TI2V")
    return arguments


def config_of_backbone(path_or_repo: str | Path) -> dict[str, Any]:
    """The config that a backbone asks for, `section.field` to value, as overrides would say it.

    Raises:
        FileNotFoundError, ValueError: as `StoredBackbone.at`.
    """
    return _fields(StoredBackbone.at(path_or_repo).arguments)


def backbone_arguments(config: Config) -> dict[str, Any]:
    """What diffusers' constructor is given for a config."""
    m, channels = config.model, config.codec.channels
    return dict(
        patch_size=m.patch,
        num_attention_heads=m.heads,
        attention_head_dim=m.head_dim,
        in_channels=channels + (config.timeline.temporal_stride + channels if m.first_frame == "concat" else 0),
        out_channels=channels,
        text_dim=config.text.width,
        freq_dim=m.freq_dim,
        ffn_dim=m.ffn_dim,
        num_layers=m.layers,
        eps=m.eps,
        image_dim=m.image_dim,
        added_kv_proj_dim=m.width if m.image_dim else None,
    )


def _fields(arguments: dict[str, Any]) -> dict[str, Any]:
    channels = arguments["out_channels"]
    extra = arguments["in_channels"] - channels
    if extra not in (0, MASK_CHANNELS + channels):
        raise ValueError(
            f"the backbone has in_channels {arguments['in_channels']} and out_channels {channels}; expected {channels}, or {channels} + {MASK_CHANNELS} + {channels} "
            "where the first frame is joined to the channels"
        )
    return {
        "model.layers": arguments["num_layers"],
        "model.heads": arguments["num_attention_heads"],
        "model.head_dim": arguments["attention_head_dim"],
        "model.ffn_dim": arguments["ffn_dim"],
        "model.freq_dim": arguments["freq_dim"],
        "model.eps": arguments["eps"],
        "model.patch": tuple(arguments["patch_size"]),
        "model.first_frame": "concat" if extra else "token",
        "model.image_dim": arguments["image_dim"],
        "codec.channels": channels,
        "text.width": arguments["text_dim"],
    }


def check_sizes(config: Config, arguments: dict[str, Any], where: str) -> None:
    """Refuse a config of another size than the backbone's; image embeddings may be added to a backbone that has none.

    Raises:
        ValueError: naming every field that differs, with expected and found.
    """
    wrong = []
    for name, found in _fields(arguments).items():
        section, field = name.split(".")
        expected = getattr(getattr(config, section), field)
        if expected != found and not (name == "model.image_dim" and found is None):
            wrong.append((name, expected, found))
    if wrong:
        told = ", ".join(f"{name} is {expected}, found {found}" for name, expected, found in wrong)
        remedy = " ".join(f"{name}={list(found) if isinstance(found, tuple) else 'null' if found is None else found}" for name, _, found in wrong)
        raise ValueError(f"the backbone in {where} has other sizes than the config: {told}; set {remedy}, or name another model.pretrained")


# ------------------------------------------------------------------------------------------------ loading


def model_from_backbone(
    build: Callable[[Config, Backbone], Model],
    path_or_repo: str | Path,
    config: Config,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    new_dtype: torch.dtype | None = None,
) -> Model:
    """A world action model on a pretrained backbone; what the backbone has no weights for starts as the constructors say, from the seed.

    Args:
        build: the model's class, called with the config and the loaded backbone.
        dtype: of the backbone's weights; default: as stored.
        new_dtype: of everything else's; default: the backbone's.

    Raises:
        FileNotFoundError: no folder, config, index or shard (named).
        ValueError: other sizes than the config's, a shard cut short, or a tensor that does not fit (named, expected and found).
    """
    backbone = load_backbone(path_or_repo, config, dtype, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        model = build(config, backbone)
    for name in ("expert", "action_time"):
        part = getattr(model, name, None)
        if part is not None:
            expert_from_video(backbone, part, None if name == "expert" else "condition_embedder.")
    for name, part in model.named_children():
        if name != "backbone":
            part.to(device=device, dtype=new_dtype or backbone.dtype)
    for parameter in model.parameters(recurse=False):
        parameter.data = parameter.data.to(device, new_dtype or backbone.dtype)
    return model


def load_backbone(path_or_repo: str | Path, config: Config, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Backbone:
    """A pretrained backbone, its sizes checked against the config's; memory holds it once.

    Raises:
        FileNotFoundError, ValueError: as `model_from_backbone`.
    """
    stored = StoredBackbone.at(path_or_repo)
    arguments, where = dict(stored.arguments), str(stored.folder)
    check_sizes(config, arguments, where)
    if config.model.image_dim is not None and arguments["image_dim"] is None:
        arguments |= {"image_dim": config.model.image_dim, "added_kv_proj_dim": config.model.width}
    backbone = build_empty(lambda: Backbone(**arguments))
    with stored.reader() as reader:
        image = [name for name in backbone.state_dict() if _of_image(name)]
        new = [] if set(image) & {stored.own(name) for name in reader.names()} else image
        load_into(backbone, reader, stored.own, dtype=dtype, device=device, what=where, ignore=new)
    if new:
        _start_image_branch(backbone, new, config.training.seed, device)
    return backbone.to(device)  # buffers, which no checkpoint holds


def new_names(backbone: Backbone, path_or_repo: str | Path) -> list[str]:
    """Names of the backbone's that its pretrained weights do not have: an image branch that was added."""
    found = StoredBackbone.at(path_or_repo)
    with found.reader() as reader:
        stored = {found.own(name) for name in reader.names()}
    return [name for name in backbone.state_dict() if name not in stored]


def _of_image(name: str) -> bool:
    return "image_embedder" in name or any(f".attn2.{part}." in name for part in ("add_k_proj", "add_v_proj", "norm_added_k"))


def _start_image_branch(backbone: Backbone, names: list[str], seed: int, device: str | torch.device) -> None:
    """Give an image branch that has no pretrained weights its first ones: normal with variance 1 / fan-in, and values of zero, so that nothing changes at first."""
    generator = torch.Generator().manual_seed(seed)
    dtype = backbone.patch_embedding.weight.dtype
    for name in names:
        *path, last = name.split(".")
        owner = backbone.get_submodule(".".join(path))
        old = owner._parameters[last]
        assert old is not None
        value = torch.zeros(old.shape)
        if "norm" in name and last == "weight":
            value.fill_(1)
        elif last == "weight" and "add_v_proj" not in name:
            value.normal_(0, value.shape[1] ** -0.5, generator=generator)
        owner._parameters[last] = nn.Parameter(value.to(device, dtype))


# ------------------------------------------------------------------------------------------------ an expert out of the video's weights


@torch.no_grad()
def expert_from_video(backbone: nn.Module, expert: nn.Module, prefix: str | None = None) -> None:
    """Start an expert from the video's weights of the same names, narrowed by linear interpolation (Fast-WAM, arXiv 2603.16666).

    A width that differs is resampled like a signal along its dimension, both ends kept; widths that agree (heads x head_dim, the
    text's) are taken as they are.  A matrix that then sums over `da` inputs instead of `dv` is scaled by sqrt(dv / da), which keeps
    the size of its sums.  The six modulations that `time_proj` puts out are six signals, not one.

    Args:
        backbone: holds a parameter under every name of the expert's, e.g. `blocks.0.attn1.to_q.weight` (3072, 3072) for (3072, 1024).
        prefix: of the expert's names in the backbone, e.g. "condition_embedder.".

    Raises:
        ValueError: a parameter that the backbone has no counterpart of (named).
    """
    video = dict(backbone.named_parameters())
    for name, parameter in expert.named_parameters():
        source = video.get(f"{prefix or ''}{name}")
        if source is None:
            raise ValueError(f"the backbone has no {prefix or ''}{name!r} to start the expert's from; they are of different kinds")
        groups = 6 if "time_proj" in name else 1
        value = source.detach().float().unflatten(0, (groups, -1))
        shape = (groups, parameter.shape[0] // groups, *parameter.shape[1:])
        for dim in range(1, value.ndim):
            value = interpolate(value, dim, shape[dim])
        if parameter.ndim == 2:
            value = value * (source.shape[1] / parameter.shape[1]) ** 0.5
        parameter.copy_(value.flatten(0, 1))


def interpolate(x: Tensor, dim: int, size: int) -> Tensor:
    """Resample one dimension linearly to `size` points from its first to its last."""
    if x.shape[dim] == size:
        return x
    at = torch.linspace(0, x.shape[dim] - 1, size, dtype=torch.float64)
    below = at.floor().long().clamp(max=x.shape[dim] - 2)
    fraction = (at - below).to(x).view(-1, *[1] * (x.ndim - dim - 1))
    below = below.to(x.device)
    return torch.lerp(x.index_select(dim, below), x.index_select(dim, below + 1), fraction)
