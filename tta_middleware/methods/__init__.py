"""Ask/tell searches over prompt embeddings: ours, the paper's method and the controls."""

from tta_middleware.methods.base import Method, Needs, Start
from tta_middleware.methods.controls import Noise, Resample
from tta_middleware.methods.race import Move, Race
from tta_middleware.methods.tsa import TSA

__all__ = ["TSA", "Method", "Move", "Needs", "Noise", "Race", "Resample", "Start"]
