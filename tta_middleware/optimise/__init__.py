"""Ask/tell searches over prompt embeddings: ours, the paper's method and the controls."""

from tta_middleware.optimise.base import Method, Needs, Start
from tta_middleware.optimise.controls import Noise, Resample
from tta_middleware.optimise.race import Move, Race
from tta_middleware.optimise.tsa import TSA

__all__ = ["TSA", "Method", "Move", "Needs", "Noise", "Race", "Resample", "Start"]
