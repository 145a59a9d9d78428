"""Operations that keep gradients and weights off a subspace; needs torch alone."""

from grasp_kernels.autograd import project_gradient
from grasp_kernels.dispatch import backend
from grasp_kernels.orthonormalize import orthonormalize_
from grasp_kernels.project import explain, project, project_
from grasp_kernels.projector import Projector

__all__ = [
    "Projector",
    "backend",
    "explain",
    "orthonormalize_",
    "project",
    "project_",
    "project_gradient",
]
