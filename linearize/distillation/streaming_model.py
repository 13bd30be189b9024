"""A converted model of which a few layers at a time are in memory: its own forward runs, entered and left where they are."""

from __future__ import annotations

import re
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.conversion.architectures import ARCHITECTURES
from linearize.conversion.offload import ON_DISK, Shards, bring, offload, quiet, release, trim
from linearize.devices import pick_dtype
from linearize.distillation.stages import first_position
from linearize.errors import UnsupportedError
from linearize.loading import class_of
from linearize.modeling.modeling_linearized import PREFIX


class Left(Exception):
    """Leaves a model's forward with the hidden states (B, T, D) that were asked for."""

    def __init__(self, hidden: Tensor, in_tuple: bool) -> None:
        super().__init__("left on purpose")
        self.hidden, self.in_tuple = hidden, in_tuple


class Skeleton:
    """A checkpoint whose weights stay in its files; `folder` takes those that transformers fuses on loading.

    UnsupportedError for a family that is not listed: whether one hidden state is all that its layers hand on is not known.
    """

    def __init__(self, directory: Path, device: torch.device, folder: Path) -> None:
        made, config = class_of(directory)
        if config["model_type"].removeprefix(PREFIX) not in ARCHITECTURES:
            what = f"{config['model_type'].removeprefix(PREFIX)} is not among the families whose layers can be streamed"
            raise UnsupportedError(what, str(directory), "leave --stream-layers out, or see: linearize architectures")
        self.close = weakref.finalize(self, shutil.rmtree, folder, True)  # called when the process ends, at the latest
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with quiet():
            self.model: Any = made.from_pretrained(directory, dtype="auto", device_map=dict(ON_DISK), offload_folder=str(folder))
        self.model.eval().requires_grad_(False)
        self.shards: Shards = release(self.model, folder, pick_dtype("auto", self.model.dtype, device))
        self.device = device
        offload(self.model, self.shards, device)
        found = re.match(r"(.*?)\.\d+\.", self.model.config.linearize["layers"][0]["module"])
        assert found is not None
        self.path = found[1]
        self.layers: nn.ModuleList = self.model.get_submodule(self.path)
        self.hidden: Tensor | None = None

    @property
    def bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def mixers(self, layers: range) -> dict[str, nn.Parameter]:
        """The new parameters of these layers, by their names in the model."""
        inside = tuple(f"{self.path}.{i}." for i in layers)
        return {name: p for name, p in self.model.named_parameters() if ".linearize." in name and name.startswith(inside)}

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """The token embedding is in memory, and `read` leaves before the first layer."""
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise Left(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], False)

        handle = self.layers[0].register_forward_pre_hook(leave, with_kwargs=True)
        bring(embedding, self.shards, self.device, name)
        try:
            yield
        finally:
            handle.remove()
            self._drop(embedding, name)

    @contextmanager
    def block(self, layers: range, in_tuple: bool) -> Iterator[None]:
        """These layers are in memory, `read` enters at the first of them with `hidden` and leaves after the last.

        `in_tuple`: the layers return their hidden states in a tuple, so that those which are passed by must do so too.
        """
        for i in layers:
            bring(self.layers[i], self.shards, self.device, f"{self.path}.{i}")
        for layer in self.layers[: layers.start]:
            layer.forward = partial(_pass_by, in_tuple)
        handles = [
            self.layers[layers.start].register_forward_pre_hook(self._enter, with_kwargs=True),
            self.layers[layers.stop - 1].register_forward_hook(_leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in self.layers[: layers.start]:
                del layer.forward
            for i in layers:
                self._drop(self.layers[i], f"{self.path}.{i}")

    def read(self, positions: Tensor, ids: Tensor | None = None, hidden: Tensor | None = None) -> Left:
        """Rows (B, T): tokens for `embedding`, or what the first layer of a `block` reads (B, T, D). Returns what comes out."""
        self.hidden = hidden
        given: dict[str, Any] = {"input_ids": ids}
        if hidden is not None:  # the embedding's place is taken by zeros, which nothing reads
            width = self.model.get_input_embeddings().embedding_dim
            given = {"inputs_embeds": hidden.new_zeros(*positions.shape, width)}
        try:
            self.model(**given, position_ids=positions + first_position(self.model))
        except Left as left:
            return left
        finally:
            self.hidden = None
        raise RuntimeError("the model's forward went past the layer where it was to be left")

    def whole(self) -> Any:
        """The model, every module of which reads its weights as it runs or is saved."""
        self.model.hf_device_map = dict(ON_DISK)
        self.model.tie_weights()  # hooks part what was one parameter
        return self.model

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": self.hidden}
        return (self.hidden, *args[1:]), kwargs

    def _drop(self, module: nn.Module, name: str) -> None:
        offload(module, self.shards, self.device, name)
        trim()


def _pass_by(in_tuple: bool, *args: Any, **kwargs: Any) -> Any:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return (hidden,) if in_tuple else hidden


def _leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
    in_tuple = isinstance(output, tuple)
    raise Left(output[0] if in_tuple else output, in_tuple)
