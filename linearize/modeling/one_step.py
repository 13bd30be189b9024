"""One token through a mixer by one kernel, where there is one for it."""

from __future__ import annotations

from typing import Any

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .memory import State
from .native import OWN
from .native_hybrid import fuses, steps
from .native_operators import HELD, hybrid_step, slots_step, takes_step
from .places import Place
from .products import LOG2E
from .rope import in_halves
from .storage import EIGHT, FOUR
from .stream import Inputs
from .window import Scores

Terms = tuple[Tensor | None, ...]
Fused = tuple[tuple[Tensor, Tensor], Terms]
Held = tuple[Tensor, Tensor, Tensor | None, Tensor]
Sources = tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


def stepped(mixer: Any, inputs: Inputs, state: State, place: Place, in_place: bool) -> tuple[Tensor, State] | None:
    """(B, 1, H, V) and the next state of one token of each row; None where there is no kernel for it."""
    near, dtype = (inputs.q, inputs.k, inputs.v), inputs.q.dtype
    if not takes_step(*near, dtype=dtype):
        return None
    scale, window = inputs.score.scale * LOG2E, mixer.spec.window
    given = fused(mixer, inputs.score, state, dtype)
    if given is not None:
        after, held = moved(state, place, in_place)
        return hybrid_step(near, *_far_sources(mixer, inputs), place.count, held, *given, window, scale), after
    if not (steps(mixer.spec) and _open(mixer, inputs.score, state, dtype)):
        return None
    read = _slots_read(mixer, inputs, state, place)
    if read is None:
        return None
    after = _copied(state, place, in_place)
    own = mixer.spec.more_heads
    more_of = [own.index(head) if head in own else -1 for head in range(mixer.shape.kv_heads)]
    return slots_step(near, place.count, [after.get(name) for name in HELD], *read, more_of, window, scale), after


def _open(mixer: Any, score: Scores, state: State, dtype: torch.dtype) -> bool:
    """Whether nothing is asked of the step that kernels do not know."""
    if score.softcap is not None or score.null is not None or mixer.ablate is not None:
        return False
    return dtype in OWN and state["k"].dtype in (*OWN, EIGHT)


def fused(mixer: Any, score: Scores, state: State, dtype: torch.dtype) -> Fused | None:
    """What kernels for a mixer like the default read of it, its maps and the terms of its far mass; None without one.

    `dtype` is the model's; whether a kernel takes the tensors that it is given is for who gives them to ask.
    """
    if not fuses(mixer.spec, mixer.shape) or not _open(mixer, score, state, dtype):
        return None
    maps, terms = mixer.maps(), mixer.far_mass.own()
    return (maps, terms) if takes_step(*maps, *terms) else None


def _copied(state: State, place: Place, in_place: bool) -> State:
    """The state that a kernel is yet to put a token in: in tensors of its own, or, `in_place`, in the same."""
    names = () if in_place else [name for name in state if name != "count"]
    copies = {name: state[name].clone(memory_format=torch.contiguous_format) for name in names}
    return {**state, "count": place.after, **copies}


def moved(state: State, place: Place, in_place: bool) -> tuple[State, Held]:
    """The same of a mixer like the default, and what of it the kernel writes to."""
    after = _copied(state, place, in_place)
    return after, (after["k"], after["v"], after.get("far_k"), after["far"])


def _far_sources(mixer: Any, inputs: Inputs) -> Sources:
    """What the far half's queries and keys are made of, and the rotation (cos, sin) that is left to undo."""
    q, k, cos, sin = inputs.q, inputs.k, inputs.cos, inputs.sin
    if mixer.spec.far_rope:
        return (q, k), (None, None)
    normed = mixer.spec.far_norm or inputs.raw_q is None
    if normed and inputs.rope == "half" and cos is not None and sin is not None and in_halves(q, cos, sin):
        return (q, k), (cos, sin)
    return (mixer.plain(q.float(), inputs.raw_q, inputs), mixer.plain(k.float(), inputs.raw_k, inputs)), (None, None)


def _slots_read(mixer: Any, inputs: Inputs, state: State, place: Place) -> tuple[Terms, Terms, Terms] | None:
    """What a kernel for a window with slots reads of the mixer: maps, terms of the far mass, and what its scores are made of."""
    maps: Terms = mixer.maps() if mixer.spec.has_far else (None, None)
    terms: Terms = mixer.far_mass.own() if mixer.spec.has_far else (None, None, None)
    learned: Terms = (None, None)
    if "slot_k" in state and state["slot_k"].dtype not in (torch.float32, EIGHT, FOUR):
        return None
    if mixer.slot_score is not None:
        hidden = None if inputs.hidden is None else inputs.hidden.float()
        learned = mixer.slot_score.arrived(hidden, place.position), mixer.slot_score.attention
    return (maps, terms, learned) if takes_step(*maps, *terms, *learned) else None
