"""Real virtual environments whose packages are hard links to those of the running one, so that nothing is downloaded."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

LEFT_OUT = {"linearize", "triton"}  # what is under test, and what no CPU needs
# without what the shell says of Python: it would reach into the new environments
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @property
    def site(self) -> Path:
        return next(self.root.glob("lib/python*/site-packages"))

    def run(self, *command: str | Path, cwd: Path, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command of this environment, by its name in bin, with `more` variables."""
        words = [self.root / "bin" / command[0], *command[1:]]
        path = f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        env = {**CLEAN, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}
        made = subprocess.run([str(word) for word in words], cwd=cwd, env=env, text=True, capture_output=True, check=False)
        assert not check or made.returncode == 0, f"{' '.join(map(str, command))}\n{made.stdout}\n{made.stderr}"
        return made


def closure(names: Iterable[str]) -> dict[str, set[str]]:
    """Top-level files of these packages and of all that they need here, by package."""
    found: dict[str, set[str]] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found or name in LEFT_OUT:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:  # an extra, or for another platform
            continue
        found[name] = {file.parts[0] for file in package.files or [] if file.parts[0] not in ("..", "__pycache__")}
        needed = (requirement.partition(";") for requirement in package.requires or [])
        waiting += [re.split(r"[\s\[(<>=!~]", head.strip())[0] for head, _, marker in needed if "extra ==" not in marker]
    return found


def make_environment(root: Path, packages: Iterable[str], with_pip: bool = False) -> Environment:
    """An empty virtual environment, then this one's packages in it. Whatever pip does there leaves the originals alone."""
    venv.EnvBuilder(symlinks=True, with_pip=with_pip).create(root)
    made = Environment(root)
    for name, files in closure(packages).items():
        home = Path(str(distribution(name).locate_file("")))
        for file in files:
            source, target = home / file, made.site / file
            if source.is_dir():
                shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)
            elif source.is_file() and not target.exists():
                link(str(source), str(target))
    return made


def link(source: str, target: str) -> None:
    if Path(target).exists():
        return
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
