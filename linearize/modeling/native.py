"""Kernels for CPUs: what PyTorch does there in many passes over memory, in one. Exact, in float32; a model's own also in bfloat16.

They are built from the sources beside this file, by PyTorch's own extension builder, when they are first called for, and kept in
the user's cache. Without a compiler and ninja, on processors without AVX2, and in the code that a checkpoint carries, PyTorch
computes everything. LINEARIZE_BACKEND=torch takes no kernel, `native` must have them; whatever they do not take, PyTorch does.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar, cast

try:
    import torch
    from torch import Tensor
    from torch._subclasses import FakeTensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

BACKENDS = ("auto", "torch", "native", "fla")
SOURCES = Path(__file__).with_name("cpu")
WIDTH = 16  # rows of numbers are filled up to a multiple of it; tiles.h
F = TypeVar("F", bound=Callable[..., Any])
OPERATORS: list[Callable[[], Any]] = []  # what makes each of them
OWN = (torch.float32, torch.bfloat16)  # of a model whose own tensors kernels take
PLAIN = (Tensor, torch.nn.Parameter)  # a subclass may have numbers of its own
FLAGS = {"AVX512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3"}


def asked() -> str:
    """LINEARIZE_BACKEND. ValueError where it is none."""
    found = os.environ.get("LINEARIZE_BACKEND", "auto")
    if found not in BACKENDS:
        raise ValueError(f"LINEARIZE_BACKEND must be one of {', '.join(BACKENDS)}, got {found!r}")
    return found


def library() -> ctypes.CDLL | None:
    """The kernels, built where they are not yet; None where they cannot be."""
    found = attempt()
    return found if isinstance(found, ctypes.CDLL) else None


@cache
def attempt() -> ctypes.CDLL | Exception:
    """The same, or why they cannot be."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in FLAGS:
        return RuntimeError(f"no kernels for a processor with {capability}")
    if not SOURCES.is_dir():
        return FileNotFoundError(f"no sources in {SOURCES}")
    text = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir()))
    seen = hashlib.sha256(text + torch.__version__.encode())  # operators.cpp is built for one version
    name = f"kernels_{capability.lower()}_{seen.hexdigest()[:12]}"
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "linearize" / f"{name}.so"
        if not path.exists():
            from torch.utils.cpp_extension import load

            _build(load, name, FLAGS[capability], path)
        return ctypes.CDLL(str(path))
    except (ImportError, OSError, RuntimeError) as error:
        return error


def _build(load: Callable[..., Any], name: str, flag: str, path: Path) -> None:
    """Compiled apart and then moved: whoever stops on the way leaves nothing half done, and no lock that others wait for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        built = load(
            name, [str(source) for source in sorted(SOURCES.glob("*.cpp"))], build_directory=directory, is_python_module=False,
            extra_cflags=["-O3", "-fopenmp", flag], extra_ldflags=["-fopenmp"],
        )  # fmt: skip
        os.replace(built, path)


def takes(*tensors: Tensor | None, traced: bool = False, dtype: torch.dtype = torch.float32) -> bool:
    """Whether kernels compute a call with these tensors of a dtype; of a trace, those alone that it takes for operators: `traced`.
    ImportError where they must and cannot be built."""
    backend, tracing = asked(), torch.compiler.is_compiling()
    if backend not in ("auto", "native") or (tracing and not traced):
        return False
    for x in tensors:  # some hundred times a token: a generator each would take as long as the rest
        if x is not None and (x.dtype != dtype or not x.is_cpu or not x.numel() or not (tracing or type(x) in PLAIN)):
            return False
    found = library()
    if found is None and backend == "native":
        why = attempt()
        need = "LINEARIZE_BACKEND=native needs a C++ compiler with OpenMP and ninja, linearize's extra 'cpu'"
        raise ImportError(f"{need}: {shorten(str(why), 100)}") from (why if isinstance(why, Exception) else None)
    return found is not None


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether gradients are wanted of any of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def takes_frozen(*tensors: Tensor | None, traced: bool = False, dtype: torch.dtype = torch.float32) -> bool:
    """Whether kernels without a backward pass compute a call with these tensors."""
    return takes(*tensors, traced=traced, dtype=dtype) and not differentiable(*tensors)


@cache
def keep_memory() -> bool:
    """Memory of large CPU tensors is used again from now on, in this process; False where there are no kernels."""
    found = library() if asked() in ("auto", "native") else None
    if found is not None:
        found.keep_memory()
    return found is not None


def give_back() -> None:
    """What is kept and not in use goes back to the system."""
    if keep_memory.cache_info().currsize and keep_memory():
        call("give_back")


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def as_operator(function: F) -> F:
    """A function of tensors by a kernel, without gradients, which a trace (torch.compile, torch.export) takes for one operator.

    It is made where it is first asked for, or by `operators`: whoever loads what was traced calls that first.
    """

    @cache
    def operator() -> Any:
        name = f"linearize::{function.__name__}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))  # torch.library.custom_op takes 9 us more a call
        torch.library.impl(name, "CPU", function)
        torch.library.register_fake(name, function)
        return getattr(torch.ops.linearize, function.__name__).default

    @wraps(function)
    def either(*given: Any, **named: Any) -> Any:
        return (operator() if torch.compiler.is_compiling() else function)(*given, **named)

    OPERATORS.append(operator)
    return cast(F, either)


def operators() -> None:
    """Make all that traces take for operators."""
    for operator in OPERATORS:
        operator()


def call(name: str, *arguments: Tensor | float | int | None) -> None:
    """A kernel on tensors' memory, 64-bit integers and floats; nothing where a trace asks for shapes alone."""
    if arguments and isinstance(arguments[0], FakeTensor):
        return
    kernel = getattr(library(), name)
    if kernel.argtypes is None:  # the same at every call
        kinds = {float: ctypes.c_float, int: ctypes.c_int64}
        kernel.argtypes = [kinds.get(type(x), ctypes.c_void_p) for x in arguments]
    kernel(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])


def up(size: int) -> int:
    """A row's numbers with what fills it up."""
    return -(-size // WIDTH) * WIDTH


def rows(x: Tensor) -> Tensor:
    """x with channels side by side, as kernels read rows."""
    return x if x.stride(-1) == 1 else x.contiguous()
