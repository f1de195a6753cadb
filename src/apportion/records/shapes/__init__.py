"""The shapes of adapters as plain data, one file per shape."""

from apportion.records.shapes.base import LARGEST_SCALE, MAX_WIDTH, SMALLEST_SCALE, Part, Shape
from apportion.records.shapes.low_rank import LowRank
from apportion.records.shapes.registry import lora_shape, register, shape_as_dict, shape_from_dict
from apportion.records.shapes.routed import Routed
from apportion.records.shapes.sparse import Sparse

__all__ = [
    "LARGEST_SCALE",
    "MAX_WIDTH",
    "SMALLEST_SCALE",
    "LowRank",
    "Part",
    "Routed",
    "Shape",
    "Sparse",
    "lora_shape",
    "register",
    "shape_as_dict",
    "shape_from_dict",
]
