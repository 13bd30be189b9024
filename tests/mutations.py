"""Break the runtime in one place at a time and see the law tests fail: python tests/mutations.py [NAME ...].

Each mutation is a replacement in a copy of the package, run in a process of its own. Exit code 1 if one survives.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = Path("linearize") / "modeling"
DENOMINATOR_KEEPS = """

def _undecayed(form, gate_at):
    def broken(*args, **options):
        bare = [None if i == gate_at else x for i, x in enumerate(args)]
        pairs = zip(form(*args, **options), form(*bare, **options), strict=True)
        return tuple(torch.cat([own[..., :-1], other[..., -1:]], -1) for own, other in pairs)

    return broken


chunked, step = _undecayed(chunked, 3), _undecayed(step, 3)
"""
TWICE = """            _, far = chunked(k[:, :, None], k, v, gate, far, terraced=block)
            _, far = chunked(k"""
DIFFERENCES = """    b = g.cumsum(-2)
    sums = (b[..., :, None, :] - b[..., None, :, :]).flatten(-3, -2)
    pairs: Tensor = sums"""

# name: file, what stands there (nothing: the end), what stands there instead
MUTATIONS = {
    "no decay in the denominator": ("mixer.py", "", DENOMINATOR_KEEPS),
    "a token handed over twice at decode": ("mixer.py", "            _, far = chunked(k", TWICE),
    "a token handed over while still in the window": (
        "window.py",
        "first = query - spec.window + 1",
        "first = query - spec.window",
    ),
    "sinks handed over too": ("mixer.py", "valid = (position >= spec.sinks) & (first", "valid = (position >= 0) & (first"),
    "kv groups scrambled in the far half": (
        "mixer.py",
        "k.repeat_interleave(repeats, dim=1), v.repeat",
        "k.repeat(1, repeats, 1, 1), v.repeat",
    ),
    "kv groups scrambled in the near half": (
        "mixer.py",
        "q = s.q.unflatten(1, (self.shape.kv_heads, self.groups))\n        k, v",
        "q = s.q.unflatten(1, (self.groups, self.shape.kv_heads)).transpose(1, 2)\n        k, v",
    ),
    "gates of tokens that do not enter": (
        "mixer.py",
        "gate = None if gate is None else gate * valid",
        "gate = gate if gate is None or True else gate * valid",
    ),
    "pads enter the memory": ("mixer.py", "phi = phi * valid[:, None, :, None].to(phi.dtype)", "pass"),
    "the window's cache forgotten at decode": (
        "mixer.py",
        "after[name] = put(state[name], x, slot)",
        "after[name] = put(torch.zeros_like(state[name]), x, slot)",
    ),
    "the gate of the token that enters is the newest's": (
        "mixer.py",
        'gate = held("recent_gate") if',
        "gate = s.gate.expand(-1, -1, block, -1) if",
    ),
    "blocks counted from the call's start": ("mixer.py", "offset = count % block\n", "offset = count * 0\n"),
    "a maximum over later queries": (
        "window.py",
        "top = scores.detach().amax(-1)",
        "top = scores.detach().amax((-2, -1))[..., None].expand(scores.shape[:-1])",
    ),
    "convolution starts anew at each call": ("mixer.py", "past = state or {}", "past = {}"),
    "convolution counts pads": ("convolution.py", "if lengths is None:", "if True:"),
    "softcap left out": ("window.py", "return scores if self.softcap is None else", "return scores if True else"),
    "the state holds on to the whole call": (
        "recurrence_additive.py",
        "[:, :, -1].clone(memory_format=torch.contiguous_format)",
        "[:, :, -1]",
    ),
    "plain rounding to bf16": ("memory.py", "if dtype != torch.bfloat16:", "if True:"),
    "decay from differences of sums": ("recurrence_additive.py", "    pairs: Tensor = sums", DIFFERENCES),
    "beams keep their old states": ("memory.py", "self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))", "pass"),
    "crop forgets too few": (
        "memory.py",
        "self.replay(self.replayable - dropped)",
        "self.replay(max(self.replayable - dropped, 1))",
    ),
    "packed documents run on": ("rows.py", "inner = cu_seq_lens[1:-1]", "inner = cu_seq_lens[1:1]"),
    "autocast inside the mixer": (
        "mixer.py",
        "torch.autocast(inputs.q.device.type, enabled=False)",
        "torch.autocast(inputs.q.device.type, enabled=torch.is_autocast_enabled(inputs.q.device.type))",
    ),
}
# where to look first; all law tests follow if these pass
FIRST = {
    "plain rounding to bf16": "test_mixers.py::test_long_decode_in_bf16",
    "decay from differences of sums": "test_engine.py",
    "beams keep their old states": "test_models.py",
    "crop forgets too few": "test_models.py",
    "packed documents run on": "test_models.py",
}


def killer(name: str) -> str | None:
    """The first test that fails under this mutation, or None."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("linearize", "tests/laws"):
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "tests/conftest.py"):
            shutil.copy(ROOT / part, Path(folder) / part)
        file, old, new = MUTATIONS[name]
        path = Path(folder) / RUNTIME / file
        text = path.read_text(encoding="utf-8")
        if old and old not in text:
            raise SystemExit(f"{name}: {file} no longer says '{old}'")
        path.write_text(text.replace(old, new) if old else text + new, encoding="utf-8")
        laws = Path("tests") / "laws"
        for chosen in (laws / FIRST.get(name, "test_mixers.py"), laws):
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(chosen)]
            environment = {**os.environ, "PYTHONPATH": folder}
            output = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout
            found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
            if found:
                return found[1].removeprefix("tests/laws/")
    return None


def main(chosen: list[str]) -> int:
    survivors = 0
    for name in chosen or MUTATIONS:
        test = killer(name)
        survivors += test is None
        print(f"{name}: {'SURVIVES' if test is None else test}", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
