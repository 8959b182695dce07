"""Table of placements: which page leaves the device tier when another needs its frame."""

from sgl_psa.memory.placements.base import Placement
from sgl_psa.memory.placements.demand import Demand
from sgl_psa.memory.placements.layer_even import LayerEven
from sgl_psa.memory.placements.lru import LeastRecent

#: ``PSAConfig.placement`` -> class.
PLACEMENTS: dict[str, type[Placement]] = {
    placement.name: placement for placement in (Demand, LeastRecent, LayerEven)
}

__all__ = ["PLACEMENTS", "Placement"]
