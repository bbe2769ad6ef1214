"""Second-order information for everyday PyTorch."""

from importlib.metadata import version

from quadric.backprop.registry import UnsupportedOperation, register_rule
from quadric.backprop.walk import hessian_diagonal
from quadric.curvature import Curvature
from quadric.influence import influence
from quadric.matrix import BlockMean, Dense, Diagonal, LowRank, PSDMatrix
from quadric.methods.block_mean import BlockMeanAdaGrad, BlockMeanSum
from quadric.methods.ginger import Ginger, HeaviestDirections, sampled_loss
from quadric.methods.hesscale import AdaHesScale, HessianDiagonal
from quadric.methods.isaac import ISAAC, InputMoment, isaac, relative
from quadric.methods.mfac import MFAC, GradientWindow
from quadric.optimizer import CurvatureOptimizer
from quadric.pruning.batch_norm import reestimate_batch_norm
from quadric.pruning.gradual import GradualPruner
from quadric.pruning.masks import Masks, hold_masks
from quadric.pruning.prune import prune
from quadric.pruning.result import PruneResult
from quadric.verify import verify

__all__ = [
    "ISAAC",
    "MFAC",
    "AdaHesScale",
    "BlockMean",
    "BlockMeanAdaGrad",
    "BlockMeanSum",
    "Curvature",
    "CurvatureOptimizer",
    "Dense",
    "Diagonal",
    "Ginger",
    "GradientWindow",
    "GradualPruner",
    "HeaviestDirections",
    "HessianDiagonal",
    "InputMoment",
    "LowRank",
    "Masks",
    "PSDMatrix",
    "PruneResult",
    "UnsupportedOperation",
    "hessian_diagonal",
    "hold_masks",
    "influence",
    "isaac",
    "prune",
    "reestimate_batch_norm",
    "register_rule",
    "relative",
    "sampled_loss",
    "verify",
]

__version__ = version("quadric")
