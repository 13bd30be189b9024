"""Memory of large CPU tensors that is used again; asked in processes of their own, since it is never taken back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from called_kernels import needs_kernels

pytestmark = needs_kernels
START = """
import resource, threading, torch
from linearize.modeling.native import keep_memory
MB = 1 << 20
def mapped():  # bytes of this process that lie in memory
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def made(size, value=1):
    return torch.full((size,), value, dtype=torch.uint8)
before = made(40 * MB)
assert keep_memory() and keep_memory()
"""


def holds(script: str) -> None:
    found = subprocess.run([sys.executable, "-c", START + script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_a_freed_block_is_the_next_ones() -> None:
    holds("""
x = made(40 * MB)
where = x.data_ptr()
del x
y = made(39 * MB, 2)
assert y.data_ptr() == where and int(y[-1]) == 2  # comparisons of all would leave blocks of their own
z = made(40 * MB, 3)
assert z.data_ptr() != where and int(y[-1]) == 2 and int(z[-1]) == 3
del y
small = made(20 * MB)  # not in a block that is much larger
assert small.data_ptr() != where
""")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux what lies in memory")
def test_it_is_bounded_by_what_was_in_use() -> None:
    """Blocks of ever other sizes, one at a time: what is kept of them is half of the largest at most."""
    holds("""
start = mapped()
for size in range(100, 40, -2):
    made(size * MB)
    assert mapped() - start < 155 * MB, (size, (mapped() - start) / MB)
""")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux what lies in memory")
def test_it_can_be_given_back() -> None:
    holds("""
from linearize.modeling.native import give_back
start = mapped()
held = [made(100 * MB) for _ in range(3)]
del held[0], held[0]
assert mapped() - start > 250 * MB
give_back()
assert mapped() - start < 150 * MB and bool((held[0] == 1).all())
""")


def test_what_other_allocators_gave_goes_back_to_them() -> None:
    """Tensors from before, small ones, ones that grow, and ones that another thread frees."""
    holds("""
del before
grows = torch.empty(4)
for size in (10, MB, 3 * MB, 5):
    grows.resize_(size).fill_(1.0)
held = [made(2 * MB, i) for i in range(50)]
threads = [threading.Thread(target=lambda: [held.pop(), made(3 * MB)]) for _ in range(40)]
for t in threads: t.start()
for t in threads: t.join()
assert [int(x[-1]) for x in held] == list(range(10))
a = torch.randn(600, 700)
assert torch.allclose(a @ a.T, (a.double() @ a.double().T).float(), atol=1e-3)
""")


@pytest.mark.parametrize("backend, kept", [("torch", False), ("auto", True)])
def test_without_kernels_it_stays_as_it_is(backend: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", backend)
    script = f"from linearize.modeling.native import keep_memory\nassert keep_memory() is {kept}"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
