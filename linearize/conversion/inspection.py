"""What a checkpoint is, without loading its weights. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linearize.checkpoint import read_manifest
from linearize.conversion.plan import KV_DTYPE_BYTES, KV_LENGTHS
from linearize.modeling.plans import is_causal, plan_layers, plan_spec
from linearize.opening import check


def inspect(directory: Path, verify: bool = True) -> dict[str, Any]:
    """Plan, stages, source, bytes and whether every file is as it was written. Errors as in loading."""
    config = check(directory, hashes=verify)
    plan, files = config["linearize"], read_manifest(directory)["files"].values()
    layers = []
    for layer in plan_layers(plan):
        spec, shape = plan_spec(plan, layer)
        layers.append(
            {"index": layer["index"], "module": layer["module"], "state_bytes": spec.state_bytes(shape), "mixer": spec.to_dict()}
        )
    kv = sum(2 * layer["shape"]["kv_heads"] * layer["shape"]["head_dim"] * KV_DTYPE_BYTES for layer in plan_layers(plan))
    kv += kv // len(layers) * plan["softmax_layers"] if layers else 0
    lengths = KV_LENGTHS if is_causal(plan) else ()  # an encoder caches nothing
    return {
        "path": str(directory), "model_type": config["model_type"], "method": plan["method"], "options": plan["options"],
        "start": plan["start"], "stages": plan["stages"], "merged": any(s.get("merged") for s in plan["stages"]),
        "source": plan["source"], "layers": layers, "softmax_layers": plan["softmax_layers"],
        "state_bytes": sum(layer["state_bytes"] for layer in layers),
        "kv_bytes": {str(n): n * kv for n in lengths}, "linearize_version": plan["version"], "schema": plan["schema"],
        "files": {"verified": verify, "count": len(files), "bytes": sum(file["bytes"] for file in files)},
    }  # fmt: skip
