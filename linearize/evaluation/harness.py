"""lm-evaluation-harness, in process: its tasks, and YAML tasks of one's own, on student and teacher alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linearize.errors import InputError, ResourceError
from linearize.evaluation.reading import Variant
from linearize.progress import Progress

EXTRA = "pip install 'linearize[harness]'"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def need_harness() -> None:
    """ResourceError where lm-evaluation-harness is missing: said before anything is loaded."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ResourceError("tasks need lm-evaluation-harness", "--tasks", EXTRA) from None


def harness(
    variants: Mapping[str, Variant], tokenizer: Any, tasks: Sequence[str], *,
    limit: int | None, folder: Path | None, seed: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """For each task: its `metrics`, `letters` and `examples` by variant, and the letters that are `right`.

    Letters are which answer was the likeliest of a multiple choice, A the first: a model that has lost its sense often answers
    one letter always, which an accuracy near chance does not tell. InputError names a task that there is not.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder) if folder else None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        fix = "see: lm-eval ls tasks; --task-folder for your own"
        raise InputError(f"lm-evaluation-harness has no task '{unknown[0]}'", "--tasks", fix)
    found: dict[str, Any] = {}
    for number, (name, variant) in enumerate(variants.items()):
        progress(f"tasks: {name}", number, len(variants))
        model: Any = variant.model
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, backend="causal")
        with variant.context():
            done = simple_evaluate(
                lm, tasks=list(tasks), limit=limit, task_manager=manager, random_seed=seed, numpy_random_seed=seed,
                torch_random_seed=seed, fewshot_random_seed=seed, bootstrap_iters=1000, log_samples=True, verbosity="ERROR",
            )  # fmt: skip
        for task, metrics in done["results"].items():
            entry = found.setdefault(task, {"metrics": {}, "letters": {}, "right": {}, "examples": 0})
            entry["metrics"][name] = {key.removesuffix(",none"): x for key, x in metrics.items() if isinstance(x, float)}
            samples = [s for s in done["samples"].get(task, []) if is_choice(s)]
            entry["examples"] = max(entry["examples"], len(done["samples"].get(task, [])))
            if samples:
                entry["letters"][name] = letters(likeliest(s) for s in samples)
                entry["right"] = letters(int(s["target"]) for s in samples)
        progress(f"tasks: {name}", number + 1, len(variants))
    return found


def is_choice(sample: Mapping[str, Any]) -> bool:
    """Whether a sample is of a multiple choice: several answers' likelihoods, and the number of the right one."""
    answers = sample["filtered_resps"]
    told = str(sample["target"])
    return len(answers) > 1 and told.isdigit() and all(isinstance(x, tuple | list) for x in answers)


def likeliest(sample: Mapping[str, Any]) -> int:
    """The number of the answer with the highest likelihood."""
    answers = sample["filtered_resps"]
    return max(range(len(answers)), key=lambda i: float(answers[i][0]))


def letters(chosen: Any) -> dict[str, int]:
    """How often each letter was chosen."""
    counts = Counter(LETTERS[i % len(LETTERS)] for i in chosen)
    return {letter: counts[letter] for letter in sorted(counts)}
