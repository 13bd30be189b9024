"""Published methods and the default, at the same tokens, data and seed: python recipes/equal_tokens.py FOLDER --data TEXT

Each method is trained twice: as published (its start, its losses, no sinks beside those it has), and with four sinks, the
calibrated start and the default's losses. A method whose curriculum has one stage spends all tokens there. With `--layout`
the recipe smollm2-5mb.yaml is converted and learns beside them.
What FOLDER has already is not made again. Then all are controls of recipes/fidelity.py beside the last of them; what is not known
here is for that.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from linearize.methods import DEFAULT
from linearize.methods.base import ATTENTION, LORA
from linearize.methods.layout import stages_of
from linearize.recipe import count

HERE = Path(__file__).parent
METHODS = ("hedgehog", "lolcats", "liger", "lawcat")
OURS = {ATTENTION: ["loss=relative_mse"], LORA: ["loss=kl", "lr=2e-4", "mixer_lr=1e-3"]}  # the default's, which names no other


def linearize(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "linearize", *map(str, words)], check=True)


def settings(method: str, tokens: dict[str, int], changes: dict[str, list[str]]) -> Iterator[str]:
    """`--set` of each stage that the method has: its share of the tokens, all of them where it has no other, and changes."""
    kinds = [stage.kind for stage in stages_of(method) if stage.kind in tokens]
    for kind in kinds:
        share = tokens[kind] if len(kinds) > 1 else sum(tokens.values())
        for change in (f"tokens={share}", *changes.get(kind, [])):
            yield from ("--set", f"stages.{kind}.{change}")


def train(made: Path, source: Sequence[str], args: argparse.Namespace, learns: Sequence[str]) -> Path:
    """A checkpoint under that name, converted by these words first where it is not one already."""
    if made.exists():
        return made
    start = made.with_name(f"{made.name}-untrained")
    if not start.exists():
        linearize("convert", args.model, *source, "--dtype", args.dtype, *data(args, "--calibration"), "-o", start)
    linearize("distill", start, *data(args, "--data"), *learns, "--seed", str(args.seed), "-o", made)
    return made


def data(args: argparse.Namespace, flag: str) -> list[str]:
    return [flag, args.data, "--held-out", str(args.held_out)]


def trained(args: argparse.Namespace) -> Iterator[Path]:
    """Every checkpoint, the most interesting last."""
    tokens = {ATTENTION: count(args.attention), LORA: count(args.lora)}
    for method in args.methods.split(","):
        published = ["-m", method, "--start", "published"]
        yield train(args.folder / method, published, args, list(settings(method, tokens, {})))
        ours = ["-m", method, "--set", "sinks=4"]
        yield train(args.folder / f"{method}-ours", ours, args, list(settings(method, tokens, OURS)))
    yield train(args.folder / DEFAULT, ["-m", DEFAULT], args, list(settings(DEFAULT, tokens, {})))
    if args.layout:
        recipe = ["--recipe", str(HERE / "smollm2-5mb.yaml")]
        yield train(args.folder / "layout", recipe, args, [*recipe, *settings(DEFAULT, tokens, {})])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--held-out", type=int, default=20)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--layout", action="store_true", help="the layout of smollm2-5mb.yaml too")
    parser.add_argument("--attention", default="24k", help="tokens of attention transfer")
    parser.add_argument("--lora", default="12k", help="tokens of LoRA")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args, rest = parser.parse_known_args()
    *controls, student = trained(args)
    words = [student, *controls, "--data", args.data, "--held-out", str(args.held_out), "-o", args.folder / "fidelity.json", *rest]
    subprocess.run([sys.executable, HERE / "fidelity.py", *map(str, words)], check=True)


if __name__ == "__main__":
    main()
