"""The mark of tests that need a GPU: nothing can stand in for it. `make test` runs them where there is one."""

import pytest

NEEDS_CUDA = pytest.mark.cuda
