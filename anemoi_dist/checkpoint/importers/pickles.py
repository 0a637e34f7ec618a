"""Other programs' pickles, opened without running what is in them."""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from anemoi_dist.errors import ConfigError


class Inert:
    """Stands for an object whose attributes are wanted, not its behaviour."""

    def __init__(self, *args: Any) -> None:
        self.args = args


class Placeholder:
    """Stands for an object that is not built, nor its class imported: of it there is only what the file says.

    Attributes
    ----------
    state : Any
        What the object would have been given by its ``__setstate__``: in most cases its attributes, by name.
    """

    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Placeholder:
        """Make nothing, where the object was a function or a method."""
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Hold nothing, where the object was a dictionary."""

    def append(self, item: Any) -> None:
        """Hold nothing, where the object was a list."""

    extend = append


#: What DeepSpeed saves with its tensors, and what is made of it. DeepSpeed itself need not be installed.
_STAND_INS: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
]

_DCP_METADATA = {
    "torch.distributed.checkpoint.metadata": (
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),
    "collections": ("OrderedDict",),
}

#: What unpicklers raise besides their own error on bytes that are no pickle; they run nothing of the user's.
_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def load_torch_file(path: Path, *, trust: bool) -> Any:
    """Open a file that ``torch.save`` wrote; tensors stay on the disk until they are used.

    Parameters
    ----------
    path : Path
        The file.
    trust : bool
        Build every object in it, which may run any code.

    Raises
    ------
    ConfigError
        It holds objects that are not known to be harmless, or is no such file. Nothing of it has been run.
    """
    with _reported(path), torch.serialization.safe_globals(_STAND_INS):
        return torch.load(path, map_location="cpu", weights_only=not trust, mmap=_is_zip(path))


def load_tensors(path: Path) -> Any:
    """Open a file that ``torch.save`` wrote; all but tensors and plain values become a :class:`Placeholder`.

    Raises
    ------
    ConfigError
        It is no such file.
    """
    with _reported(path):
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_TensorPickle, mmap=_is_zip(path))


def load_tensor(data: bytes, *, path: Path) -> torch.Tensor:
    """Open one tensor that ``torch.save`` wrote into a part of ``path``; it is never trusted with more."""
    with _reported(path):
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor):
        raise ConfigError("SOURCE", str(path), f"holds a {type(tensor).__name__} where a tensor should be")
    return tensor


def load_dcp_metadata(path: Path, *, trust: bool) -> Any:
    """Open the ``.metadata`` of a torch DCP directory, a plain pickle that DCP itself opens with everything in it."""
    with _reported(path), path.open("rb") as stream:
        # Whoever gives --trust-pickle has asked for it; nobody else comes to pickle.load.
        return pickle.load(stream) if trust else _MetadataUnpickler(stream).load()  # noqa: S301


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Report whatever an unpickler raises as one kind of error that names ``path``."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from None
    except _UNREADABLE as error:
        raise ConfigError("SOURCE", str(path), f"cannot be read: {_first_line(error)}") from error


class _MetadataUnpickler(pickle.Unpickler):
    """Builds what DCP's metadata is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = name in _DCP_METADATA.get(module, ())
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name} was not an allowed global")


#: What tensors are made of.
_TENSOR_PARTS = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    *(("torch._utils", f"_rebuild_{name}") for name in ("tensor_v2", "parameter")),
}


class _TensorPickle:
    """The module that :func:`torch.load` unpickles with, for :func:`load_tensors`."""

    class Unpickler(pickle.Unpickler):
        """Builds tensors and what pickles spell out (numbers, texts, lists, dictionaries); imports nothing else."""

        def find_class(self, module: str, name: str) -> Any:
            is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            return super().find_class(module, name) if is_dtype or (module, name) in _TENSOR_PARTS else Placeholder


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _refused(path: Path, error: Exception) -> ConfigError:
    named = re.search(r"GLOBAL (\S+)", str(error))
    what = f"it would run {named[1]}" if named else _first_line(error)
    return ConfigError(
        "SOURCE",
        str(path),
        f"is a pickle that cannot be opened without running what is in it: {what}",
        fix="if you know who wrote it: --trust-pickle (it runs whatever is in the file)",
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
