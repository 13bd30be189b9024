"""Where the time of a step goes: the processor's own time in each operator, by torch's profiler, in groups."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch.profiler import ProfilerActivity, profile

from linearize.benchmarks.training import Step
from linearize.devices import Clock
from linearize.evaluation.timing import seconds_of

TOP = 12
OPTIMIZER, BETWEEN, OTHER = "optimizer", "between operators", "other"
GROUPS = {  # patterns of whole names, without what torch puts around them
    "matrix products": r"(add|b|badd)?(mm|mv)|dot|matmul|linear|mkldnn_\w+|\w*convolution\w*",
    "softmax attention": r"scaled_dot_product_\w+",
    "softmax and exp": r"\w*softmax\w*|exp2?|expm1|log1?p?|log2|logsumexp|logaddexp|sigmoid\w*|silu\w*|softplus\w*|tanh|erf",
    "copies": r"copy|to_copy|cat|clone|contiguous|index\w*|gather\w*|scatter\w*|stack|repeat\w*|constant_pad_nd|roll|flip",
    "views and allocation": r"empty\w*|new_\w+|zeros?\w*|fill|resize|\w*view\w*|reshape\w*|expand|\w*transpose|t|permute|"
    r"as_strided|slice|select|\w*squeeze|detach|unfold|narrow|full\w*|ones\w*|arange\w*|alias|split\w*|chunk|unbind|lift_fresh",
    "sums and maxima": r"sum|mean|a?max|a?min|\w*norm|any|all|topk|sort|cum\w+|var\w*",
    "elementwise": r"add|mul|div|sub|rsub|neg|where|masked_fill|clamp\w*|pow|square|r?sqrt|reciprocal|eq|ne|lt|le|gt|ge|bitwise\w+|"
    r"logical\w+|cos|sin|abs|triu|tril|lerp|addc\w+|maximum|minimum|sign|floor\w*|remainder|isfinite",
}


def group_of(operator: str) -> str:
    """The group of an operator, by its name; a backward operator is of its forward one's group."""
    name = operator.removeprefix("aten::").strip("_").removesuffix("_backward_data").removesuffix("_backward")
    return next((group for group, pattern in GROUPS.items() if re.fullmatch(pattern, name)), OTHER)


def profiled(run: Callable[[], object], clock: Clock) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of one call under the profiler, and of each operator in it: name, calls, seconds of its own."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        took = seconds_of(run, clock)
    found = [{"name": e.key, "calls": e.count, "seconds": e.self_cpu_time_total / 1e6} for e in prof.key_averages()]
    return took, [one for one in found if one["name"].startswith("aten::")]


def step_profile(step: Step, clock: Clock) -> dict[str, Any]:
    """Groups of operators and the longest operators of one step, with their share of its time.

    The profiler slows calls down: what lies between operators (Python, autograd) is told larger than it is.
    """
    step()  # the first one makes the optimizer's moments
    took, operators = profiled(step.backward, clock)
    update, _ = profiled(step.update, clock)
    totals = dict.fromkeys([*GROUPS, OTHER], 0.0)
    for one in operators:
        totals[group_of(one["name"])] += one["seconds"]
    totals |= {OPTIMIZER: update, BETWEEN: max(took - sum(totals.values()), 0.0)}
    return shares(totals, operators, took + update)


def shares(totals: Mapping[str, float], operators: list[dict[str, Any]], whole: float) -> dict[str, Any]:
    """Both lists, longest first, each with its share of `whole` seconds."""
    order = sorted(totals, key=lambda group: -totals[group])
    longest = sorted(operators, key=lambda one: -one["seconds"])[:TOP]
    return {
        "seconds": whole,
        "groups": [{"group": group, "seconds": totals[group], "share": totals[group] / whole} for group in order if totals[group]],
        "operators": [{**one, "group": group_of(one["name"]), "share": one["seconds"] / whole} for one in longest],
    }
