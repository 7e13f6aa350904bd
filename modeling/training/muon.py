"""Muon: momentum whose step for a matrix is made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

torch.optim.Muon takes matrices alone. Here a convolution's kernel counts as the matrix of its output channels by all
the rest, matrices of one shape share their products, and everything with fewer dimensions is Adam's. A step is scaled
as long as one of Adam's usually is (Liu et al. 2025, https://arxiv.org/abs/2502.16982), so one learning rate fits both.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from modeling.inference.device import computes_in_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration, five times: as Jordan et al. have tuned them
WIDE = (2, 3)  # the five, as they are multiplied for a matrix with at least three times as many columns as rows
LARGE = 128  # rows from which on bf16, where the hardware has it, is faster than float32
ADAMS_LENGTH = 0.2  # the usual root mean square of an update of Adam, in learning rates


class Muon(torch.optim.Adam):
    """Orthogonal steps for parameters of two or more dimensions, Adam's for the others."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float, **adam: Any) -> None:
        parameters = list(parameters)
        matrices: dict[str, Any] = {"params": [p for p in parameters if p.ndim > 1], "momentum": momentum}
        super().__init__([matrices, {"params": [p for p in parameters if p.ndim < 2]}], lr, **adam)
        self._updates: Updates | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Without Adam's own, which mends states of old versions of PyTorch and wants Adam's for every parameter."""
        torch.optim.Optimizer.__setstate__(self, state)
        self._updates = None

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Takes one step; `closure` is not used."""
        with torch.no_grad():
            self._step()

    def _step(self) -> None:
        matrices, others = groups = self.param_groups
        self.param_groups = [others]  # for Adam there is nothing else
        try:
            super().step()
        finally:
            self.param_groups = groups
        params = [p for p in matrices["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        # All of them in one call, since a GPU waits for calls.
        grads, means = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(means, grads, 1 - matrices["momentum"])
        if self._updates is None or [*map(id, self._updates.params)] != [*map(id, params)]:
            self._updates = Updates(params)
        updates = self._updates
        torch._foreach_copy_(updates.views, grads)
        torch._foreach_lerp_(updates.views, means, matrices["momentum"])  # one step ahead, as Nesterov's
        updates.orthogonalise()
        for stack, members, views in updates.alike:
            length = matrices["lr"] * ADAMS_LENGTH * math.sqrt(max(stack.shape[1:]))
            torch._foreach_add_(members, views, alpha=-length)


class Updates:
    """A matrix for each parameter, with those of one shape in one tensor.

    A row is an output channel, with its numbers as they lie in memory: their order does not matter to the products.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        groups = defaultdict(list)
        for p in params:
            groups[len(p), math.prod(p.shape[1:]), p.dtype].append(p)
        self.alike = []  # for each shape: the tensor [N, rows, columns], its parameters, and views as these
        views = {}
        for (rows, columns, dtype), members in groups.items():
            stack = torch.empty(len(members), rows, columns, dtype=dtype, device=members[0].device)
            for p, matrix in zip(members, stack, strict=True):
                strides = torch.empty_like(p, device="meta").stride()  # as of p, without holes
                if strides[0] * rows != p.numel():  # a row would be scattered
                    strides = torch.empty(p.shape, device="meta").stride()
                views[p] = matrix.as_strided(p.shape, strides, matrix.storage_offset())
            self.alike.append((stack, members, [views[p] for p in members]))
        self.views = [views[p] for p in params]
        self._replayed = params[0].is_cuda
        self._graph: torch.cuda.CUDAGraph | None = None

    def orthogonalise(self) -> None:
        """Replaces each matrix by the one that `orthogonal` makes of it; on CUDA by one call, the replay of a graph."""
        if not self._replayed:
            self._orthogonalise()
            return
        if self._graph is None:
            for stack, *_ in self.alike:
                orthogonal(stack)  # what is loaded or chosen at a first call cannot be recorded
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._orthogonalise()
            self._graph = graph
        self._graph.replay()

    def _orthogonalise(self) -> None:
        for stack, *_ in self.alike:
            stack.copy_(orthogonal(stack))


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T of each of the matrices U S V^T [N, rows, columns]: singular values from 0.7 to 1.2.

    Those below 0.002 of the root of the sum of all squares stay smaller: they grow 480-fold.
    By the Newton-Schulz iteration, which needs nothing but products of matrices: x becomes p x, where p is a
    polynomial of the Gram matrix g = x x^T, and g becomes p g p. So with many more columns than rows, as of a kernel,
    several p are multiplied before x is. Not all: the rounding of g grows twelvefold each time, and x makes it anew.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.mT if tall else matrices
    rows, columns = x.shape[1:]
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    # Small products take their time to begin.
    x = x.to(torch.bfloat16 if rows >= LARGE and computes_in_bf16(x.device) else torch.float32)
    unit = a * torch.eye(rows, dtype=x.dtype, device=x.device)

    def factor(gram: Tensor) -> Tensor:
        return unit + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)

    for together in WIDE if columns >= 3 * rows else [1] * sum(WIDE):
        gram = torch.bmm(x, x.mT)
        product = p = factor(gram)
        for _ in range(together - 1):
            gram = torch.bmm(torch.bmm(p, gram), p)
            p = factor(gram)
            product = torch.bmm(p, product)
        x = torch.bmm(product, x)
    return x.mT if tall else x
