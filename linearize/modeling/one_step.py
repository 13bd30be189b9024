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
from .native_hybrid import steps
from .native_operators import HELD, Read, Terms, mixer_step, takes_step
from .places import Place
from .products import LOG2E
from .rope import in_halves
from .storage import EIGHT, FOUR
from .stream import Inputs
from .window import Scores

Sources = tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


def stepped(mixer: Any, inputs: Inputs, state: State, place: Place, in_place: bool) -> tuple[Tensor, State] | None:
    """(B, 1, H, V) and the next state of one token of each row; None where there is no kernel for it."""
    near, dtype, hidden = (inputs.q, inputs.k, inputs.v), inputs.q.dtype, inputs.hidden
    read = reads(mixer, inputs.score, state, dtype) if takes_step(*near, dtype=dtype) else None
    if read is None or (mixer.slot_score is not None and (hidden is None or not takes_step(hidden, dtype=dtype))):
        return None
    after, held = moved(state, place, in_place)
    given = hidden if mixer.slot_score is not None else None
    scale = inputs.score.scale * LOG2E
    return mixer_step(near, *_far_sources(mixer, inputs), given, place.count, held, read, mixer.spec.window, scale), after


def reads(mixer: Any, score: Scores, state: State, dtype: torch.dtype) -> Read | None:
    """What a kernel that takes the whole step reads of the mixer; None without one.

    `dtype` is the model's; whether the kernel takes the tensors that it is given is for who gives them to ask.
    """
    if not steps(mixer.spec) or score.softcap is not None or score.null is not None or mixer.ablate is not None:
        return None
    if dtype not in OWN or state["k"].dtype not in (*OWN, EIGHT):
        return None
    if "slot_k" in state and state["slot_k"].dtype not in (torch.float32, EIGHT, FOUR):
        return None
    maps: Terms = mixer.maps() if mixer.spec.has_far else (None, None)
    terms: Terms = mixer.far_mass.own() if mixer.spec.has_far else (None, None, None)
    learned: Terms = (None,) * 4 if mixer.slot_score is None else mixer.slot_score.own()
    own = mixer.spec.more_heads
    more_of = [own.index(head) if head in own else -1 for head in range(mixer.shape.kv_heads)]
    return (maps, terms, learned, more_of) if takes_step(*maps, *terms, *learned) else None


def moved(state: State, place: Place, in_place: bool) -> tuple[State, list[Tensor | None]]:
    """The state after a token that a kernel is yet to put in its place, and what of it that writes to: tensors of its own, or,
    `in_place`, the same."""
    names = () if in_place else [name for name in state if name != "count"]
    copies = {name: state[name].clone(memory_format=torch.contiguous_format) for name in names}
    after = {**state, "count": place.after, **copies}
    return after, [after.get(name) for name in HELD]


def _far_sources(mixer: Any, inputs: Inputs) -> Sources:
    """What the far half's queries and keys are made of, and the rotation (cos, sin) that is left to undo."""
    q, k, cos, sin = inputs.q, inputs.k, inputs.cos, inputs.sin
    if mixer.spec.far_rope or not mixer.spec.has_far:
        return (q, k), (None, None)
    normed = mixer.spec.far_norm or inputs.raw_q is None
    if normed and inputs.rope == "half" and cos is not None and sin is not None and in_halves(q, cos, sin):
        return (q, k), (cos, sin)
    return (mixer.plain(q.float(), inputs.raw_q, inputs), mixer.plain(k.float(), inputs.raw_k, inputs)), (None, None)
