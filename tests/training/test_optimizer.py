"""The optimizers of the registry, and the learning rate."""

import dataclasses
import math
from contextlib import contextmanager

import pytest
import torch
from helpers.configs import group
from helpers.cuda import NEEDS_CUDA
from helpers.training import adam
from torch import nn

from modeling.settings.keys import own_keys
from modeling.training.muon import LARGE, Updates, orthogonal
from modeling.training.optimizer import OPTIMIZERS, build_optimizer, learning_rate


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_get_the_keys_of_their_group(name):
    parameter = nn.Parameter(torch.ones(2))
    config = group("optimizer", name, lr=0.1)
    changed = {"betas": [0.8, 0.95], "eps": 1e-5, "weight_decay": 0.3, "momentum": 0.95}
    config = dataclasses.replace(config, **{key: changed.get(key, value) for key, value in own_keys(config).items()})
    optimizer = build_optimizer(config, [parameter])
    for key, value in {"lr": 0.1, **own_keys(config)}.items():
        assert optimizer.param_groups[0][key] == pytest.approx(value)
    parameter.sum().backward()
    optimizer.step()
    assert (parameter < 1).all()


def test_learning_rate():
    warm_up = [learning_rate(adam(warmup_steps=4), step, 10) for step in (0, 1, 3, 9)]
    assert warm_up == pytest.approx([2.5e-4, 5e-4, 1e-3, 1e-3])
    assert learning_rate(adam(warmup_steps=0, lr_decay="linear"), 4, 10) == pytest.approx(6e-4)
    cosine = [learning_rate(adam(warmup_steps=0, lr_decay="cosine"), step, 9) for step in (0, 3, 9)]
    assert cosine == pytest.approx([1e-3, 0.5e-3 * (1 + math.cos(math.pi / 3)), 0])
    assert learning_rate(adam(warmup_steps=0, lr_decay="cosine"), 18, 9) == 0  # never up again


def test_the_length_of_a_gradient_does_not_matter_to_muon(generator):
    matrices = torch.randn(2, 3, 4, generator=generator)
    assert torch.equal(orthogonal(2**-20 * matrices), orthogonal(matrices))


@pytest.mark.parametrize("has_bf16", [False, True])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (8, 40), (40, 8), (LARGE, 160), (160, LARGE), (LARGE, 512)])
def test_steps_of_muon_are_the_iteration_as_it_is_defined(shape, has_bf16, generator, monkeypatch):
    """In float64; and no longer where bf16 says nothing of the small singular values. Without bf16, in float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16})
    matrices = torch.randn(2, *shape, generator=generator)
    matrices[1] *= torch.logspace(0, -4, shape[1])
    expected = matrices.double() / torch.linalg.matrix_norm(matrices.double(), keepdim=True)
    for _ in range(5):
        gram = expected @ expected.mT
        expected = 3.4445 * expected - 4.7750 * gram @ expected + 2.0315 * gram @ gram @ expected
    bf16, found = has_bf16 and min(shape) >= LARGE, orthogonal(matrices)
    assert found.dtype == (torch.bfloat16 if bf16 else torch.float32)
    found = found.double()
    error = torch.linalg.matrix_norm(found - expected, 2)
    assert error[0] < (0.1 if bf16 else 1e-4) and (bf16 or error[1] < 1e-3)
    assert torch.linalg.matrix_norm(found, 2).max() < 1.3


def test_muon_is_pytorchs_for_matrices_and_adam_for_the_rest(generator):
    """Kernels count as matrices; several of one shape; a parameter without a gradient stays."""
    shapes = [(6, 4), (4, 6), (4, 2, 3, 3), (4, 2, 3, 3), (5,), (3, 3)]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().flatten(1) if p.ndim > 1 else p.detach().clone()) for p in ours]
    theirs = [nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = build_optimizer(group("optimizer", "muon", lr=0.1, momentum=0.9), ours)
    matrices = [p for p in theirs if p.ndim > 1]
    peers = [
        torch.optim.Muon(matrices, 0.1, momentum=0.9, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam([theirs[4]], 0.1, betas=(0.9, 0.99)),
    ]
    for _ in range(3):
        for p, q in list(zip(ours, theirs, strict=True))[:-1]:
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.view_as(q)
        for each in (optimizer, *peers):
            each.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.view_as(q), q, rtol=1e-2, atol=1e-2)  # bf16
    assert [len(g["params"]) for g in optimizer.param_groups] == [5, 1]


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Muon's products go through a graph, which computes nothing while it is recorded; returns what is done with it."""
    done, orthogonalise = [], Updates._orthogonalise

    class Graph:
        def replay(self):
            done.append("replay")
            orthogonalise(self.updates)

    @contextmanager
    def record(graph, **options):
        with monkeypatch.context() as patch:
            patch.setattr(Updates, "_orthogonalise", lambda updates: setattr(graph, "updates", updates))
            yield
        done.append("record")

    def made(updates, params, make=Updates.__init__):
        make(updates, params)
        updates._replayed = not params[0].is_contiguous()  # the others are what to compare with

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(Updates, "__init__", made)
    return done


def test_on_cuda_muon_records_its_products_once_and_replays_them_each_step(generator, as_on_cuda):
    check_layouts("cpu", generator)
    new = ["record", "replay"]  # at first, and for other parameters
    assert as_on_cuda == [*new, "replay", *new, *new]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_muon_takes_the_same_steps_in_any_memory_layout(device, generator):
    check_layouts(device, generator)


def check_layouts(device, generator):
    """Channels-last, as on CUDA; transposed; with holes; two types; a gradient that is missing once."""
    shapes = [(4, 2, 3, 3), (4, 2, 3, 3), (4, 6), (2, 4, 1, 1), (4, 2), (4, 18), (128, 160)]
    rows = [nn.Parameter(torch.randn(shape, generator=generator).double()) for shape in shapes]
    other = [nn.Parameter(p.detach().clone(memory_format=torch.channels_last)) for p in (rows[0], rows[1])]
    other += [nn.Parameter(rows[2].detach().mT.contiguous().mT), nn.Parameter(rows[3].detach().clone())]
    holes = torch.empty_strided((4, 2), (2, 8), dtype=torch.float64)
    other += [nn.Parameter(holes.copy_(rows[4].detach())), nn.Parameter(rows[5].detach().float()), rows[6]]
    other = [nn.Parameter(p.detach().to(device)) for p in other]
    assert [p.stride() for p in other[:3]] == [(18, 1, 6, 2)] * 2 + [(1, 4)]
    optimizers = [build_optimizer(group("optimizer", "muon", lr=0.1), each) for each in (rows, other)]
    for step in range(4):
        for p, q in zip(rows, other, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).double()
            q.grad = p.grad.to(device, q.dtype)
        if step == 2:
            rows[1].grad = other[1].grad = None
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(rows, other, strict=True):
            torch.testing.assert_close(q.cpu().double(), p, rtol=1e-4, atol=1e-4 if len(p) < LARGE else 1e-2)  # bf16


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_on_from_their_saved_state(name, generator, tmp_path):
    """Bit for bit, from a file, for matrices and vectors."""
    config = group("optimizer", name, lr=0.1)
    start = [torch.randn(shape, generator=generator) for shape in ((4, 3), (2, 2, 3, 3), (5,))]
    gradients = [[torch.randn(p.shape, generator=generator) for p in start] for _ in range(3)]

    def steps(parameters, optimizer, these):
        for step in these:
            for p, g in zip(parameters, gradients[step], strict=True):
                p.grad = g.clone()
            optimizer.step()

    whole = [nn.Parameter(p.clone()) for p in start]
    steps(whole, build_optimizer(config, whole), range(3))
    first = [nn.Parameter(p.clone()) for p in start]
    optimizer = build_optimizer(config, first)
    steps(first, optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = [nn.Parameter(p.detach().clone()) for p in first]
    optimizer = build_optimizer(config, again)
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(again, optimizer, range(2, 3))
    assert all(torch.equal(p, q) for p, q in zip(whole, again, strict=True))
