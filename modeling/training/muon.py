"""Muon: momentum whose step for a matrix is made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

torch.optim.Muon takes matrices alone. Here a convolution's kernel counts as the matrix of its output channels by all
the rest, matrices of one shape share their products, and everything with fewer dimensions is Adam's. A step is scaled
as long as one of Adam's usually is (Liu et al. 2025, https://arxiv.org/abs/2502.16982), so one learning rate fits both.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Without Adam's own, which mends states of old versions of PyTorch and wants Adam's for every parameter."""
        torch.optim.Optimizer.__setstate__(self, state)

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
        updates = torch._foreach_lerp(grads, means, matrices["momentum"])  # one step ahead, as Nesterov's
        alike = defaultdict(list)
        for p, update in zip(params, updates, strict=True):
            matrix = update.flatten(1)
            alike[matrix.shape].append((p, matrix))
        for shape, pairs in alike.items():
            length = matrices["lr"] * ADAMS_LENGTH * math.sqrt(max(shape))
            steps = orthogonal(torch.stack([matrix for _, matrix in pairs]))
            members = [p for p, _ in pairs]
            changes = [step.view_as(p) for p, step in zip(members, steps, strict=True)]
            torch._foreach_add_(members, changes, alpha=-length)


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
