"""Optimizers over stacked layers: roles, masks, frozen groups, matrix-wise rules."""

from geomjax.optim.apply import apply_updates
from geomjax.optim.basis import (
    leading_right_basis,
    load_basis,
    random_basis,
    save_basis,
)
from geomjax.optim.bfloat16 import StoredState, stochastic_round, stored_bfloat16
from geomjax.optim.build import OptimizerSpec, build
from geomjax.optim.coordinate_mask import CoordinateMaskState, coordinate_mask
from geomjax.optim.freeze import freeze, frozen_paths
from geomjax.optim.given_rate import given_rate
from geomjax.optim.lamb import lamb
from geomjax.optim.make import decay_mask, make
from geomjax.optim.mask_file import load_mask, read_provenance, save_mask
from geomjax.optim.mask_select import (
    TopFraction,
    matched_random_mask,
    random_mask,
    threshold_mask,
    top_fraction_mask,
)
from geomjax.optim.muon import muon
from geomjax.optim.per_matrix import PerMatrixState, per_matrix
from geomjax.optim.project import ProjectState, project_updates
from geomjax.optim.promotion import standard_promotion
from geomjax.optim.roles import Role, Roles, map_with_roles
from geomjax.optim.schedules import learning_rate_schedule
from geomjax.optim.source_mask import SOURCE_RULES, source_mask
from geomjax.optim.sparse_adamw import SparseAdamWState, sparse_adamw
from geomjax.optim.state_figures import AdamStateFigures, adam_state_figures

__all__ = [
    "SOURCE_RULES",
    "AdamStateFigures",
    "CoordinateMaskState",
    "OptimizerSpec",
    "PerMatrixState",
    "ProjectState",
    "Role",
    "Roles",
    "StoredState",
    "SparseAdamWState",
    "TopFraction",
    "adam_state_figures",
    "apply_updates",
    "build",
    "coordinate_mask",
    "decay_mask",
    "freeze",
    "frozen_paths",
    "given_rate",
    "lamb",
    "leading_right_basis",
    "learning_rate_schedule",
    "load_basis",
    "load_mask",
    "make",
    "map_with_roles",
    "matched_random_mask",
    "muon",
    "per_matrix",
    "project_updates",
    "random_basis",
    "random_mask",
    "read_provenance",
    "save_basis",
    "save_mask",
    "source_mask",
    "sparse_adamw",
    "standard_promotion",
    "stochastic_round",
    "stored_bfloat16",
    "threshold_mask",
    "top_fraction_mask",
]
