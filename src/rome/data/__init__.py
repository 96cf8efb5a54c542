"""Images and labels: the data sets, and batches of them that do not depend on who reads them.

May import core alone.
"""

from rome.data.base import Data, Split, SplitName
from rome.data.cifar10 import CIFAR10_CLASSES, Cifar10
from rome.data.folder import ImageFolder
from rome.data.memory import Digits, MemorySplit
from rome.data.parquet import Parquet

__all__ = [
    "CIFAR10_CLASSES",
    "Cifar10",
    "Data",
    "Digits",
    "ImageFolder",
    "MemorySplit",
    "Parquet",
    "Split",
    "SplitName",
]
