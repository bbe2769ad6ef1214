"""Second-order information for everyday PyTorch."""

from importlib.metadata import version

from quadric.curvature import Curvature
from quadric.matrix import BlockMean, Diagonal, LowRank, PSDMatrix
from quadric.methods.block_mean import BlockMeanAdaGrad, BlockMeanSum
from quadric.methods.ginger import Ginger, HeaviestDirections, sampled_loss
from quadric.methods.mfac import MFAC, GradientWindow
from quadric.optimizer import CurvatureOptimizer

__all__ = [
    "MFAC",
    "BlockMean",
    "BlockMeanAdaGrad",
    "BlockMeanSum",
    "Curvature",
    "CurvatureOptimizer",
    "Diagonal",
    "Ginger",
    "GradientWindow",
    "HeaviestDirections",
    "LowRank",
    "PSDMatrix",
    "sampled_loss",
]

__version__ = version("quadric")
