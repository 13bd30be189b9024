"""Every feature map by its name in a MixerSpec."""

from __future__ import annotations

from .feature_maps_basic import Elu1, FeatureMap, Identity, L2Norm, Relu, Softmax, Unit
from .feature_maps_fixed import Cosformer, Focused, LogNormal, NormAware, Performer
from .feature_maps_hedgehog import Hedgehog, HedgehogExp, HedgehogJoint
from .feature_maps_learned import T2R, Feedforward, Rebased, Taylor

FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "identity": Identity,
    "l2norm": L2Norm,
    "unit": Unit,
    "elu1": Elu1,
    "relu": Relu,
    "softmax": Softmax,
    "hedgehog": Hedgehog,
    "hedgehog_exp": HedgehogExp,
    "hedgehog_joint": HedgehogJoint,
    "t2r": T2R,
    "feedforward": Feedforward,
    "taylor": Taylor,
    "rebased": Rebased,
    "cosformer": Cosformer,
    "performer": Performer,
    "lln": LogNormal,
    "nala": NormAware,
    "focused": Focused,
}
