"""For tests of mixers and methods, one's own included: tiny models, random inputs, points of the space, an oracle, the laws."""

from linearize.testing.models import linearized, random_inputs, random_mixer, randomise, tiny_llama, tiny_shape
from linearize.testing.oracle import oracle
from linearize.testing.points import Point, bidirectional_points, method_points, own_points, pairwise_points, random_points

__all__ = [
    "Point",
    "bidirectional_points",
    "linearized",
    "method_points",
    "oracle",
    "own_points",
    "pairwise_points",
    "random_inputs",
    "random_mixer",
    "random_points",
    "randomise",
    "tiny_llama",
    "tiny_shape",
]
