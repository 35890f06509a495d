"""DreamZero's LoRA checkpoints: what was trained, merged onto the checkpoint it was trained on, and refused on any other.

    action_head.model.base_model.model.blocks.{n}.self_attn.q.lora_A.default.weight    (r, in)
    action_head.model.base_model.model.blocks.{n}.self_attn.q.lora_B.default.weight    (out, r)        W + B A alpha / r
    action_head.model.base_model.model.action_encoder.W1.W                             in place of the base's

peft writes the layer's own weights as `q.weight` or, in newer versions, `q.base_layer.weight`; both are read.  The release loads such a
checkpoint on raw Wan instead of its base, without a word; here a base is named, and told apart by its identity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from wam.convert.options import Options
from wam.convert.report import Fate, Report
from wam.convert.wan import WAN
from wam.shards import ShardReader, TensorSource, identity

MODEL = "action_head.model."
HEADS = ("state_encoder.", "action_encoder.", "action_decoder.")
LORA = re.compile(r"(?P<layer>.*)\.lora_(?P<side>[AB])(\.default)?\.weight")


class View:
    """A source under other names."""

    def __init__(self, source: TensorSource, names: dict[str, str]):
        self.source, self.original = source, names

    def names(self) -> list[str]:
        """The new names."""
        return list(self.original)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one."""
        return self.source.shape(self.original[name])

    def dtype(self, name: str) -> torch.dtype:
        """Type of one."""
        return self.source.dtype(self.original[name])

    def get(self, name: str) -> Tensor:
        """One tensor."""
        return self.source.get(self.original[name])


def canonical(source: TensorSource, prefix: str = "") -> View:
    """A source without what peft puts into names, and with a prefix put before them.

    Raises:
        ValueError: two tensors would have one name.
    """
    names: dict[str, str] = {}
    for name in source.names():
        new = prefix + name.replace(f"{MODEL}base_model.model.", MODEL).replace(".base_layer.", ".")
        if new in names:
            raise ValueError(f"tensors {names[new]!r} and {name!r} are both {new!r}; expected one of them")
        names[new] = name
    return View(source, names)


def has_lora(source: TensorSource) -> bool:
    """Does a source hold low-rank updates?"""
    return any(LORA.fullmatch(name) for name in source.names())


def is_lora_only(source: TensorSource) -> bool:
    """Does a source hold low-rank updates, and not the layers they belong to?"""
    return has_lora(source) and not any(name.startswith(MODEL) and name.endswith("patch_embedding.weight") for name in source.names())


class Merged:
    """A base with low-rank updates added to its layers, and other tensors put in place of its own; both under canonical names.

    Raises:
        ValueError: an update without its other half or its layer, or of another shape; named, with expected and found.
    """

    def __init__(self, base: View, update: View, alpha: float, where: str):
        self.base, self.update, self.alpha = base, update, alpha
        self.pairs: dict[str, dict[str, str]] = {}
        for name in update.names():
            if match := LORA.fullmatch(name):
                self.pairs.setdefault(f"{match['layer']}.weight", {})[match["side"]] = name
        loras = {name for sides in self.pairs.values() for name in sides.values()}
        self.replaced = [] if base is update else [name for name in update.names() if name not in loras]
        self._names = list(dict.fromkeys([*(name for name in base.names() if name not in loras), *self.replaced]))
        known = set(self._names)
        for layer, sides in self.pairs.items():
            self._check(layer, sides, known, where)

    def names(self) -> list[str]:
        """Names of the merged checkpoint: no update among them."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one."""
        return self._of(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of one."""
        return self._of(name).dtype(name)

    def get(self, name: str) -> Tensor:
        """One tensor; where there is an update, added in float32 and rounded to the base's type."""
        tensor = self._of(name).get(name)
        if name not in self.pairs:
            return tensor
        a, b = (self.update.get(self.pairs[name][side]).float() for side in "AB")
        return (tensor.float() + b @ a * (self.alpha / a.shape[0])).to(tensor.dtype)

    def told(self, fates: Iterable[Fate]) -> list[Fate]:
        """Fates of a plan over the merged tensors, told of the tensors on disk, the updates' own among them."""
        out, replaced = [], set(self.replaced)
        for fate in fates:
            name = fate.source
            fate = replace(fate, source=self._of(name).original[name])
            if name in self.pairs:
                fate = replace(fate, fate="merged", note="plus its low-rank update")
            elif name in replaced:
                fate = replace(fate, note="from the LoRA checkpoint, in place of the base's")
            out.append(fate)
            for side in self.pairs.get(name, {}).values():
                shape, dtype = self.update.shape(side), str(self.update.dtype(side)).removeprefix("torch.")
                out.append(Fate(self.update.original[side], fate.component, "merged", fate.targets, shape, dtype, f"B A x {self.alpha:g} / r, added to {fate.source}"))
            if name in replaced and name in self.base.original:
                shape, dtype = self.base.shape(name), str(self.base.dtype(name)).removeprefix("torch.")
                out.append(Fate(f"base: {self.base.original[name]}", fate.component, "unused", (), shape, dtype, "the LoRA checkpoint trained it in full and brings its own"))
        return out

    def _of(self, name: str) -> View:
        return self.update if name in self.update.original else self.base

    def _check(self, layer: str, sides: dict[str, str], known: set[str], where: str) -> None:
        for side in "AB":
            if side not in sides:
                other = next(iter(sides.values()))
                raise ValueError(f"{where}: {other!r} has no lora_{side} beside it; the LoRA checkpoint is incomplete: copy it again")
        if layer not in known:
            raise ValueError(f"{where}: {sides['A']!r} updates {layer!r}, which the base does not have; it was trained on another model")
        (rank, inside), (outside, rank_b), shape = self.update.shape(sides["A"]), self.update.shape(sides["B"]), self.base.shape(layer)
        if rank != rank_b or shape != (outside, inside):
            raise ValueError(f"{where}: lora_A {[rank, inside]} and lora_B {[outside, rank_b]} make an update of {[outside, inside]}, but the base's {layer!r} has {list(shape)}; it was trained on a base of another size")


def merge_from_base(lora: ShardReader, src: Path, options: Options, alpha: float, recorded: str | None, report: Report) -> Merged:
    """A LoRA checkpoint on the base that the caller names, once that is known to be the right one.

    Raises:
        ValueError: raw Wan as a base, a base other than the one recorded, one that nothing vouches for, or shapes that do not fit.
    """
    assert options.base is not None
    update, base = canonical(lora), open_base(options.base, options.base_is_wan)
    wan = not any(name.startswith(tuple(MODEL + head for head in HEADS)) for name in base.names())
    if wan:
        _check_wan(update, src, options)
    found = base_identity(base)
    expected = options.base_hash or recorded
    if expected is not None and expected != found:
        raise ValueError(f"{src} was trained on the base {expected}, but {options.base} is {found}; name the checkpoint it was trained on with --base")
    if expected is None and not options.accept_unknown_base:
        raise ValueError(f"{src} does not say which base it was trained on; {options.base} is {found}: if you know it to be the one, pass --base-hash {found} or --accept-unknown-base")
    report.base_sha256 = found
    report.notes.append(f"base: {options.base}, identity {found}" + ("" if expected else " (taken on your word)"))
    merged = Merged(base, update, alpha, f"{src} on {options.base}")
    strays = [name for name in merged.replaced if name not in base.original and not name.startswith(tuple(MODEL + head for head in HEADS))]
    if strays:
        raise ValueError(f"{src}: unexpected tensor {strays[0]!r}, which {options.base} does not have; it was trained on another model")
    for name in merged.replaced:
        if name in base.original and base.shape(name) != update.shape(name):
            raise ValueError(f"{src}: tensor {name!r} has shape {list(update.shape(name))}, but the base's has {list(base.shape(name))}; it was trained on a base of another size")
    return merged


def open_base(path: Path, is_wan: bool) -> View:
    """A base under DreamZero's names: a DreamZero checkpoint, or Wan's own.

    Raises:
        ValueError: it is a LoRA checkpoint itself, or none of DreamZero's.
    """
    if is_wan and path.is_dir() and any(path.glob("diffusion_pytorch_model*.safetensors*")):
        return canonical(ShardReader(path, "diffusion_pytorch_model"), MODEL)
    reader = ShardReader(path)
    if has_lora(reader):
        raise ValueError(f"--base {path} holds low-rank updates itself; convert it first, or name a merged checkpoint")
    raw = "patch_embedding.weight" in reader.names()
    base = canonical(reader, MODEL if raw else "")
    if f"{MODEL}patch_embedding.weight" not in base.original:
        raise ValueError(f"--base {path} has no tensor {MODEL}patch_embedding.weight; expected a DreamZero checkpoint as it was released, not a converted one")
    return base


def base_identity(base: TensorSource) -> str:
    """The identity of a base's video transformer, under the names it has here: heads are trained in full, and do not count."""
    keys = WAN.within(MODEL)
    return identity((found[0][0], base.get(name)) for name in base.names() if (found := keys.targets(name)))


def _check_wan(update: View, src: Path, options: Options) -> None:
    if not options.base_is_wan:
        raise ValueError(f"--base {options.base} is Wan itself (it has no action_encoder), not the DreamZero checkpoint that {src} was trained on; name that, or pass --base-is-wan if it was trained on Wan directly")
    lacking = [head for head in HEADS if not any(name.startswith(MODEL + head) for name in update.names())]
    if lacking:
        raise ValueError(f"--base {options.base} is Wan itself and {src} does not bring {', '.join(h.rstrip('.') for h in lacking)}; it cannot have been trained on Wan alone: name the DreamZero checkpoint")
