"""Data sets of images and labels, and batches of them that do not depend on which process reads them.

Imports only from ``rome.core``.
"""

from rome.data.base import Data as Data
from rome.data.base import Split as Split
from rome.data.base import SplitName as SplitName
from rome.data.cifar10 import CIFAR10_CLASSES as CIFAR10_CLASSES
from rome.data.cifar10 import Cifar10 as Cifar10
from rome.data.folder import ImageFolder as ImageFolder
from rome.data.memory import Digits as Digits
from rome.data.memory import MemorySplit as MemorySplit
from rome.data.parquet import Parquet as Parquet
from rome.data.timm import Timm as Timm
