"""Operations that keep gradients and weights off a subspace; needs torch alone."""

from .autograd import project_gradient
from .dispatch import backend
from .orthonormalize import orthonormalize_
from .project import explain, project, project_
from .projector import Projector

__all__ = [
    "Projector",
    "backend",
    "explain",
    "orthonormalize_",
    "project",
    "project_",
    "project_gradient",
]

__version__ = "0.1.0"
