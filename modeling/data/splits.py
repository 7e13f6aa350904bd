"""What a data source returns: its images for training, those for testing, and the names of the classes."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]  # images [N, H, W, C] and their labels [N]
# What is too large for the memory is a function of the number of threads that yields such arrays, part by part, and
# counts in words what it did to the images.
Split = Arrays | Callable[[int, Counter[str]], Iterator[Arrays]]
Source = tuple[Split, Split, Sequence[str]]
