"""A model whose weights stay in files: accelerate's hooks bring a module's in just before it runs and drop them right after."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors.torch import save_file
from torch import Tensor, nn

from linearize.errors import IntegrityError

ON_DISK = {"": "disk"}


class Shards(Mapping[str, Tensor]):
    """A model's tensors by name, each read from its file when asked for. IntegrityError for one with a value that is not finite."""

    def __init__(self, files: OffloadedWeightsLoader, folder: Path) -> None:
        self.files, self.folder = files, folder
        self.told: Callable[[], None] = lambda: None

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self.files[name]
        if not finite(tensor):
            what = f"{name} has non-finite values"
            raise IntegrityError(what, self.files.index[name]["safetensors_file"], "nothing was written; check the source weights")
        self.told()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files.index)

    def __len__(self) -> int:
        return len(self.files.index)

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write more tensors, by their names in the model, to a file `name` of their own."""
        path = self.folder / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        self.files.index.update({key: {"safetensors_file": str(path)} for key in tensors})


def finite(tensor: Tensor) -> bool:
    """Whether all values are finite, without a second tensor of this size."""
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
        return True
    return all(isfinite(float(end)) for end in torch.aminmax(tensor.detach()))


@contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """A folder for what streaming must write before the checkpoint, on the checkpoint's disk: /tmp may be memory."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with quiet(), TemporaryDirectory(prefix=f"{output.name}.tmp-", dir=output.parent) as folder:
        yield Path(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep accelerate from warning that the weights are on disk: they are meant to be."""
    logger = logging.getLogger("accelerate.big_modeling")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def release(model: Any, folder: Path, dtype: torch.dtype) -> Shards:
    """Take the hooks off a model that was loaded to disk; returns what they read from, to be read in `dtype`.

    IntegrityError if a tensor is in no file.
    """
    hooks: list[Any] = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    shards = Shards(next(hook.weights_map.dataset for hook in hooks if hook.offload and hook.weights_map is not None), folder)
    if missing := [name for name, _ in model.named_parameters() if name not in shards.files.index]:
        raise IntegrityError(f"{missing[0]} is not among the weights", model.name_or_path, "download them again")
    for module in model.modules():
        remove_hook_from_module(module)
        vars(module).pop("forward", None)  # accelerate leaves the bound method, which would outlive a change of class
    cast(model, shards, dtype)
    return shards


def cast(model: Any, shards: Shards, dtype: torch.dtype) -> None:
    """Let what is stored in the model's dtype be read in another; what is kept in fp32 stays so.

    Asked for at loading, transformers would read and convert every tensor there too, only to drop it.
    """
    stored, wanted = (str(x).removeprefix("torch.") for x in (model.dtype, dtype))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        entry = shards.files.index[name]
        if entry["dtype"] == stored:
            shards.files.index[name] = {**entry, "dtype": wanted}
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def offload(root: nn.Module, shards: Shards, device: torch.device, prefix: str = "") -> None:
    """Let every module under `root` read its own parameters from `shards` for as long as it runs on `device`."""
    for name, module in root.named_modules(prefix=prefix):
        if any(True for _ in module.parameters(recurse=False)):
            weights = PrefixedDataset(shards, f"{name}." if name else "")
            add_hook_to_module(module, AlignDevicesHook(device, offload=True, weights_map=weights))


def bring(module: nn.Module, shards: Shards, device: torch.device, name: str) -> None:
    """Let the submodule `name` hold its parameters on `device` from now on; `offload` takes them away again.

    Only mixers get memory of their own: nothing else is written to, and what is mapped can be read again.
    """
    for owner in module.modules():
        remove_hook_from_module(owner)
        vars(owner).pop("forward", None)
    for key, _ in list(module.named_parameters()):
        path, _, own = key.rpartition(".")
        tensor = shards[f"{name}.{key}"].to(device)
        tensor = tensor.clone() if ".linearize." in f".{name}.{key}" else tensor
        setattr(module.get_submodule(path), own, nn.Parameter(tensor, requires_grad=False))


def trim() -> None:
    """Give freed memory back: glibc keeps freed activations, a tenth of a GB more with each layer of a wide model."""
    if give_back := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None:
        give_back(0)


def spill(module: nn.Module, shards: Shards, device: torch.device, name: str) -> None:
    """Write the parameters of the submodule `name` to a file and free them, with what the work on it has left in the heap."""
    tensors: dict[str, Any] = {f"{name}.{key}": parameter.detach() for key, parameter in module.named_parameters()}
    if tensors:
        shards.put(name, tensors)
        offload(module, shards, device, name)
    trim()
