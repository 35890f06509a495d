"""Tensors on disk, one at a time: checkpoints larger than memory are read, converted and written without ever being held.

    model.safetensors                              one file
    model-00001-of-00004.safetensors ...           shards, and
    model.safetensors.index.json                   which tensor lies in which

A safetensors file says in its first bytes where each tensor lies, so names, shapes and a file cut short are known before anything is
read.  Older `.pt`, `.pth` and `.bin` files are read too, mapped into memory, and never by running what they contain.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wam.files import write_json_atomic, writing

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
}
PICKLES = (".pt", ".pth", ".bin")
SHARD_BYTES = 5_000_000_000
SAMPLES = 64  # numbers of each tensor that tell checkpoints apart
DOWNLOAD = "download or copy it again"
Module = TypeVar("Module", bound=nn.Module)


class TensorSource(Protocol):
    """Anything that has named tensors and hands them out one by one."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def get(self, name: str) -> Tensor: ...


class MemorySource:
    """Tensors that are in memory already (or on the meta device, where only shapes matter)."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = dict(tensors)

    def names(self) -> list[str]:
        """All names, in their order."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one."""
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Type of one."""
        return self.tensors[name].dtype

    def get(self, name: str) -> Tensor:
        """One tensor."""
        return self.tensors[name]


class ShardReader:
    """A checkpoint on disk; tensors are read when they are asked for, and one file is open at a time.

    Attributes:
        files: the shards.
        extras: what a `.pt` file holds beside tensors, by dotted name (a step number, settings).
    """

    def __init__(self, path: str | Path, name: str | None = None):
        """Read the headers of a file or of a folder's shards.

        Args:
            path: a `.safetensors`, `.pt`, `.pth` or `.bin` file, or a folder with one checkpoint.
            name: of a folder, the checkpoint meant, e.g. "diffusion_pytorch_model"; needed only where there are several.

        Raises:
            FileNotFoundError: nothing there, a missing index or a missing shard (named).
            ValueError: a shard cut short or damaged, or an index that disagrees with its shards; the tensor is named.
        """
        self.path = Path(path)
        self.extras: dict[str, Any] = {}
        self._where: dict[str, Path] = {}
        self._headers: dict[Path, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
        self._open: tuple[Path, Any] | None = None
        single, index = _locate(self.path, name)
        self.files = [single] if single else sorted({*_read_index(index).values()}) if index else []
        for file in self.files:
            if file.suffix in PICKLES:
                self._read_pickle(file)
            else:
                self._headers[file] = read_header(file)
        if index:
            self._where = _read_index(index)
            _check_index(index, self._where, self._headers)
        else:
            self._where = {name: file for file, tensors in self._headers.items() for name in tensors}

    def names(self) -> list[str]:
        """All names, as the index or the file lists them."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._headers[self._file(name)][name][1]

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from the header."""
        return self._headers[self._file(name)][name][0]

    def get(self, name: str) -> Tensor:
        """Read one tensor, on the CPU."""
        file = self._file(name)
        if file.suffix in PICKLES:
            return self._handle(file)[name]
        try:
            return self._handle(file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: tensor {name!r} cannot be read ({error}); {DOWNLOAD}") from error

    def close(self) -> None:
        """Let go of the open file."""
        self._open = None

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _file(self, name: str) -> Path:
        if name not in self._where:
            raise ValueError(f"{self.path} has no tensor {name!r}; it holds {len(self._where)}, e.g. {', '.join(list(self._where)[:3])}")
        return self._where[name]

    def _handle(self, file: Path) -> Any:
        if self._open is None or self._open[0] != file:
            self._open = None  # the last one is closed before the next is opened
            self._open = (file, _load_pickle(file)[0] if file.suffix in PICKLES else safe_open(str(file), framework="pt", device="cpu"))
        return self._open[1]

    def _read_pickle(self, file: Path) -> None:
        tensors, extras = _load_pickle(file)
        self._open = (file, tensors)
        self.extras |= extras
        self._headers[file] = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def read_header(file: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Types and shapes of a safetensors file, whose length is checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, or cut short (bytes expected and found).
    """
    if not file.is_file():
        raise FileNotFoundError(f"shard {file} is missing; {DOWNLOAD}")
    found = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if found < 8 + length and length < 100_000_000:
            raise ValueError(f"{file} is cut short: its header alone needs {8 + length:,} bytes, the file has {found:,}; {DOWNLOAD}")
        try:
            header: dict[str, Any] = json.loads(stream.read(length)) if length < 100_000_000 else {"": None}
            entries = {name: (DTYPES[e["dtype"]], tuple(e["shape"]), e["data_offsets"][1]) for name, e in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not a safetensors file, or its header is damaged ({type(error).__name__}: {error}); {DOWNLOAD}") from error
    expected = 8 + length + max((end for *_, end in entries.values()), default=0)
    if found < expected:
        raise ValueError(f"shard {file} is cut short: expected {expected:,} bytes, found {found:,}; {DOWNLOAD}")
    return {name: (dtype, shape) for name, (dtype, shape, _) in entries.items()}


def _locate(path: Path, name: str | None) -> tuple[Path | None, Path | None]:
    """The single file, or the index, of a checkpoint."""
    if path.is_file():
        if path.name.endswith(".index.json"):
            return None, path
        if path.suffix != ".safetensors" and path.suffix not in PICKLES:
            raise ValueError(f"{path} is not a checkpoint; expected .safetensors, {', '.join(PICKLES)} or a folder")
        return path, None
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint {path}; give a file or a folder")
    for suffixes in ((".safetensors",), PICKLES):
        found = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
        indices = [file for file in found if any(file.name.endswith(f"{s}.index.json") for s in suffixes) and (not name or file.name.startswith(f"{name}."))]
        singles = [file for file in found if file.suffix in suffixes and (not name or file.stem == name or file.name.startswith(f"{name}-"))]
        if len(indices) == 1:
            return None, indices[0]
        shards = [file for file in singles if re.search(r"-\d+-of-\d+$", file.stem)]
        if not indices and shards:
            base = re.sub(r"-\d+-of-\d+$", "", shards[0].stem)
            raise FileNotFoundError(f"{path} has shards ({shards[0].name}, ...) but their index {base}{shards[0].suffix}.index.json is missing; {DOWNLOAD}")
        if not indices and len(singles) == 1:
            return singles[0], None
        if indices or singles:
            raise ValueError(f"{path} has several checkpoints: {', '.join(file.name for file in indices or singles)}; give the path of the one that is meant")
    raise FileNotFoundError(f"{path} has no {name + '.safetensors' if name else 'checkpoint'}; expected *.safetensors, with *.safetensors.index.json where there are several shards")


def _read_index(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {name: index.parent / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged or not an index ({type(error).__name__}: {error}); {DOWNLOAD}") from error
    strange = next((file for file in weight_map.values() if Path(file).name != file), None)
    if strange is not None or not files:
        raise ValueError(f"{index} lists {strange!r}; expected names of files beside it; {DOWNLOAD}")
    return files


def _check_index(index: Path, where: Mapping[str, Path], headers: Mapping[Path, Mapping[str, Any]]) -> None:
    for name, file in where.items():
        if name not in headers[file]:
            raise ValueError(f"{index} lists tensor {name!r} in {file.name}, which does not hold it; {DOWNLOAD}")
    for file, tensors in headers.items():
        stray = next((name for name in tensors if where.get(name) != file), None)
        if stray is not None:
            raise ValueError(f"{file.name} holds tensor {stray!r}, which {index} does not list there; {DOWNLOAD}")


def _load_pickle(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and the rest of a `.pt` file, nested dictionaries joined by dots; nothing in it is run."""
    if not file.is_file():
        raise FileNotFoundError(f"shard {file} is missing; {DOWNLOAD}")
    try:
        try:
            tree = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # files of PyTorch before 1.6 cannot be mapped
                raise
            tree = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} holds more than tensors and plain values, and what it holds is not run ({str(error).splitlines()[0]}); ask its author for safetensors") from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__}); it is cut short or damaged: {DOWNLOAD}") from error
    tensors: dict[str, Tensor] = {}
    extras: dict[str, Any] = {}
    _flatten(tree, "", tensors, extras)
    return tensors, extras


def _flatten(tree: Any, prefix: str, tensors: dict[str, Tensor], extras: dict[str, Any]) -> None:
    if isinstance(tree, Tensor):
        tensors[prefix] = tree.detach()
    elif isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            _flatten(value, f"{prefix}.{key}" if prefix else str(key), tensors, extras)
    else:
        extras[prefix] = tree


# ------------------------------------------------------------------------------------------------ writing


class ShardWriter:
    """Streams tensors into safetensors shards; what is held in memory is at most one shard.

    Used in a `with` block: when it ends well, shards get their names and the index is written last; otherwise nothing is left.
    One shard alone is `{name}.safetensors`, without an index.
    """

    def __init__(self, directory: str | Path, name: str = "model", max_bytes: float = SHARD_BYTES, metadata: Mapping[str, str] | None = None):
        self.directory, self.name, self.max_bytes = Path(directory), name, max_bytes
        self.metadata = {"format": "pt", **(metadata or {})}
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._names: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        """One more tensor, kept in its own type.

        Raises:
            ValueError: a name that was written before.
        """
        if name in self._names:
            raise ValueError(f"tensor {name!r} is written twice; every name may come once")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != size:  # a part of something larger, which would be kept alive and is refused by safetensors
            tensor = tensor.clone()
        self._names.add(name)
        self._pending[name] = tensor
        self._pending_bytes += size
        self._bytes += size

    def __enter__(self) -> ShardWriter:
        self.directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._flush()
                self._finish()
        finally:
            self._pending = {}
            for path, _ in self._shards:
                path.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._pending and self._shards:
            return
        with writing(self.directory / f"{self.name}.safetensors"):
            path = Path(tempfile.mkstemp(dir=self.directory, prefix=f".{self.name}.", suffix=".safetensors")[1])
            self._shards.append((path, list(self._pending)))
            save_file(self._pending, path, metadata=self.metadata)
            path.chmod(0o644)
        self._pending, self._pending_bytes = {}, 0

    def _finish(self) -> None:
        count = len(self._shards)
        index = self.directory / f"{self.name}.safetensors.index.json"
        files = [f"{self.name}.safetensors"] if count == 1 else [f"{self.name}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        stale = [p for p in self.directory.glob(f"{self.name}*.safetensors") if re.fullmatch(re.escape(self.name) + r"(-\d{5}-of-\d{5})?\.safetensors", p.name)]
        index.unlink(missing_ok=True)
        for path in stale:
            path.unlink()
        for (path, _), file in zip(self._shards, files, strict=True):
            path.replace(self.directory / file)
        if count > 1:
            weight_map = {name: file for (_, names), file in zip(self._shards, files, strict=True) for name in names}
            write_json_atomic(index, {"metadata": {"total_size": self._bytes}, "weight_map": weight_map})


# ------------------------------------------------------------------------------------------------ into a module


def build_empty(build: Callable[[], Module]) -> Module:
    """Build a module whose parameters take no memory (meta device); its buffers are real, as no checkpoint holds all of them.

    A parameter moves to the meta device as it is registered, so it is never initialised; one that is there already stays, so ties hold.
    """
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        empty = param if param is None or param.is_meta else nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, empty)

    nn.Module.register_parameter = register_empty  # type: ignore
    try:
        return build()
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_into(
    module: nn.Module,
    source: TensorSource,
    rename: Mapping[str, str] | Callable[[str], str | None] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    what: str = "the checkpoint",
    ignore: Iterable[str] = (),
) -> None:
    """Fill a module (e.g. one from `build_empty`) tensor by tensor, so that memory never holds two copies.

    Args:
        rename: name in the source to name in the module; a function may say None for what belongs elsewhere.  Default: the same names.
        dtype: what floating-point parameters become; default: as stored.
        ignore: names of the module that may stay as they are.

    Raises:
        ValueError: a tensor that is missing, unexpected or of another shape; named, with expected and found.
    """
    target: dict[str, Tensor] = dict(module.state_dict(keep_vars=True))
    aliases: dict[int, list[str]] = {}
    for name, tensor in target.items():
        aliases.setdefault(id(tensor), []).append(name)
    renamed = {name: _renamed(name, rename) for name in source.names()}
    pairs = [(name, new) for name, new in renamed.items() if new is not None]
    _check_fit(module, target, aliases, {new: source.shape(name) for name, new in pairs}, what, set(ignore))
    done: set[int] = set()
    for name, new in pairs:
        if id(target[new]) in done:
            continue
        done.add(id(target[new]))
        tensor = source.get(name)
        tensor = tensor.to(device, dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
        old = target[new]
        value: Tensor = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        for alias in aliases[id(old)]:
            _put(module, alias, value)


def _renamed(name: str, rename: Mapping[str, str] | Callable[[str], str | None] | None) -> str | None:
    if rename is None:
        return name
    return rename(name) if callable(rename) else rename.get(name, name)


def _check_fit(module: nn.Module, target: Mapping[str, Tensor], aliases: Mapping[int, list[str]], found: Mapping[str, tuple[int, ...]], what: str, ignore: set[str]) -> None:
    kind = type(module).__name__
    unexpected = [name for name in found if name not in target]
    if unexpected:
        raise ValueError(f"{what} has {len(unexpected)} unexpected tensors for {kind}, e.g. {unexpected[0]!r} {list(found[unexpected[0]])}; the checkpoint is of another model or size")
    missing = [names[0] for names in aliases.values() if not (set(names) & (set(found) | ignore))]
    if missing:
        raise ValueError(f"{what} lacks {len(missing)} tensors of {kind}, e.g. {missing[0]!r} {list(target[missing[0]].shape)}; the checkpoint is incomplete or of another model")
    for name, shape in found.items():
        if tuple(target[name].shape) != shape:
            raise ValueError(f"{what}: tensor {name!r} has shape {list(shape)}, expected {list(target[name].shape)}; the checkpoint is of another size than the config says")


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    *path, last = name.split(".")
    owner = module.get_submodule(".".join(path))
    (owner._parameters if isinstance(value, nn.Parameter) else owner._buffers)[last] = value  # type: ignore[assignment]


# ------------------------------------------------------------------------------------------------ identity


def identity(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash that tells checkpoints apart: name, shape and evenly sampled numbers of every tensor, whatever their order.

    Numbers count as bfloat16 holds them, so that weights are the same in whichever type they were stored or loaded.
    """
    parts = []
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(len(flat) - 1, 0), SAMPLES, dtype=torch.float64).long().to(flat.device)
        numbers = flat[places].to(torch.bfloat16).float().cpu().numpy().tobytes() if len(flat) else b""
        parts.append(f"{name} {tuple(tensor.shape)} ".encode() + hashlib.sha256(numbers).digest())
    return hashlib.sha256(b"\n".join(sorted(parts))).hexdigest()


def identity_of(source: TensorSource, rename: Callable[[str], str | None] | None = None) -> str:
    """`identity` of a source's tensors, under other names where `rename` gives them (None: not counted)."""
    with source if isinstance(source, ShardReader) else nullcontext():
        named = ((_renamed(name, rename), name) for name in source.names())
        return identity((new, source.get(name)) for new, name in named if new is not None)
