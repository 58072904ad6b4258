"""Geometry of prompt embeddings: norms, noise, steps and the cosine cone. Pure numpy, (n, d) rows."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tta_middleware.types import BoolVector, FloatMatrix, PromptEmbeddings

StepNorm: TypeAlias = Literal["token", "matrix"]
Rows: TypeAlias = Literal["user", "all"]
Units: TypeAlias = Literal["token_norm", "absolute"]


def movable(prompt: PromptEmbeddings, rows: Rows) -> BoolVector:
    """(T,) mask of the rows a method may move."""
    return prompt.user_mask if rows == "user" else np.ones_like(prompt.user_mask)


def mean_row_norm(rows: FloatMatrix) -> float:
    """Mean Euclidean norm of the rows; 0 for none."""
    return float(np.linalg.norm(rows, axis=1).mean()) if len(rows) else 0.0


def gaussian(rng: np.random.Generator, shape: tuple[int, int]) -> FloatMatrix:
    """U ~ N(0, I) in float32."""
    return rng.standard_normal(shape, dtype=np.float32)


def unit_step(gradient: FloatMatrix, norm: StepNorm) -> FloatMatrix:
    """g / ||g||, per row or for the matrix; zero where the gradient is zero."""
    exact = _exact(gradient)
    length = np.linalg.norm(exact, axis=1 if norm == "token" else None, keepdims=True)
    step: FloatMatrix = np.divide(exact, length, out=np.zeros_like(exact), where=length > 0).astype(np.float32)
    return step


def cosine(a: FloatMatrix, b: FloatMatrix) -> float:
    """Cosine of two matrices taken as flat vectors; 1 when either is zero or empty."""
    scale = _norm(a) * _norm(b)
    return float(np.vdot(_exact(a), _exact(b))) / scale if scale > 0 else 1.0


def relative_move(moved: FloatMatrix, origin: FloatMatrix) -> float:
    """||moved - origin|| / ||origin|| in Frobenius norm; 0 when the origin is zero or empty."""
    scale = _norm(origin)
    return _norm(moved - origin) / scale if scale > 0 else 0.0


def project_to_cone(point: FloatMatrix, axis: FloatMatrix, kappa: float) -> FloatMatrix:
    """The nearest point whose cosine with ``axis`` is at least ``kappa`` (paper, section 2).

    Matrices are taken as flat vectors. The Euclidean projection onto the cone's boundary lies on the ray
    ``kappa u + sqrt(1 - kappa^2) w`` with u the axis' direction and w the direction of the part of ``point``
    that is orthogonal to it. A point for which that projection is the apex keeps its norm instead, since a
    prompt of zeros means nothing to a model.
    """
    if cosine(point, axis) >= kappa:
        return point
    # In float32 the rest of two opposite directions is noise, and its direction is any.
    exact, u = _exact(point), _exact(axis)
    u /= np.linalg.norm(u)
    along = float(np.vdot(exact, u))
    across = exact - along * u
    across_norm = float(np.linalg.norm(across))
    if across_norm <= 1e-9 * float(np.linalg.norm(exact)):
        return np.asarray(u * np.linalg.norm(exact), dtype=np.float32)
    ray = kappa * u + math.sqrt(1.0 - kappa * kappa) * (across / across_norm)
    length = kappa * along + math.sqrt(1.0 - kappa * kappa) * across_norm
    return np.asarray(ray * (length if length > 0 else float(np.linalg.norm(point))), dtype=np.float32)


def _exact(matrix: FloatMatrix) -> NDArray[np.float64]:
    """Squares of float32 entries underflow long before the entries do."""
    return matrix.astype(np.float64)


def _norm(matrix: FloatMatrix) -> float:
    return float(np.linalg.norm(_exact(matrix)))
