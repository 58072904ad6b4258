"""Ask/tell searches over prompt embeddings: the paper's method and its controls."""

from tta_middleware.optimise.base import Method, Needs, Start
from tta_middleware.optimise.controls import Noise, Resample
from tta_middleware.optimise.tsa import TSA

__all__ = ["TSA", "Method", "Needs", "Noise", "Resample", "Start"]
