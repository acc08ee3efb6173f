"""What transformers 4 called the matrices that transformers 5 keeps stacked and fused in one parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mapconv.placement.skeleton import LiveModel


def expert_names(live: LiveModel, parameter: str) -> Mapping[tuple[int, int], str]:
    """The weight of each (expert, part of its rows) of a stacked parameter, by transformers' own way back.

    Empty where it has none: the model's experts were always one tensor (gpt-oss), or are not stored in this order.
    """
    from transformers.core_model_loading import revert_weight_conversion

    shape = live.shapes[parameter]
    names = revert_weight_conversion(live.model, {parameter: torch.empty(shape, device="meta")})
    found = {}
    for name in names:
        region = live.locate(name)
        if region.parameter != parameter or region.index is None or not region.plain:
            return {}
        found[region.index, region.part] = name
    parts = 1 + max((part for _, part in found), default=0)
    return found if len(found) == shape[0] * parts else {}
