"""For tests of mixers and methods, one's own included: tiny models, random inputs, points of the space, an oracle, the laws."""

from linearize.testing.models import linearized, random_inputs, random_mixer, randomise, tiny_llama, tiny_shape
from linearize.testing.oracle import oracle
from linearize.testing.points import Point, legal_points, method_points, pairwise_points

__all__ = [
    "Point",
    "legal_points",
    "linearized",
    "method_points",
    "oracle",
    "pairwise_points",
    "random_inputs",
    "random_mixer",
    "randomise",
    "tiny_llama",
    "tiny_shape",
]
