"""The device and its precision, seeds, and compiled networks."""

import functools
import os
import platform
import subprocess
import sys
import threading

import pytest
import torch
from helpers.configs import group
from helpers.cuda import NEEDS_CUDA
from helpers.pipeline import ROOT
from helpers.training import CPU, DIFFUSION, SMALL
from torch._dynamo.testing import CompileCounter
from torch._inductor.graph import GraphLowering

from modeling.build import build_model
from modeling.inference import device
from modeling.inference.device import Compute, choose_compute
from modeling.inference.samples import draw_samples
from modeling.reliability.errors import ConfigError, explain
from modeling.stages.sample import place_trained

CUDA = Compute(torch.device("cuda"), bf16=False)


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA device without bf16, as far as choose_compute sees."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "_kernels_run", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (100, 200))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def counter(monkeypatch):
    """Counts the graphs that torch.compile makes."""
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


@pytest.fixture
def model():
    """A small network whose outputs are not zero."""
    model = build_model(group("model", "tiny", **SMALL), DIFFUSION, (3, 8, 8), 0, 0).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def sampler(**changes):
    return group("sampler", "ddim", **{"steps": 3, "num_samples": 4, "batch_size": 2} | changes)


def test_threads_are_set_and_counted_in_words(monkeypatch):
    """No more than a container's cores, unless the user has said how many there are."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(device, "cores", lambda: 2)
    choose_compute("cpu", "fp32")
    choose_compute("cpu", "fp32", threads=3)
    monkeypatch.delenv("OMP_NUM_THREADS")
    choose_compute("cpu", "fp32")
    monkeypatch.setattr(device, "cores", lambda: 16)
    choose_compute("cpu", "fp32")
    assert asked == [3, 2]
    for count, words in ((1, "CPU, 1 thread, float32"), (2, "CPU, 2 threads, float32")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert CPU.describe() == words


def test_precision_follows_the_device(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for capabilities, expected in (({"avx512_bf16": True}, True), ({"avx2": True}, False), ({"bf16": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert choose_compute("auto", "auto").bf16 is expected
        caplog.clear()
        assert not choose_compute("cpu", "fp32").bf16 and not caplog.text
        assert choose_compute("cpu", "bf16").bf16 and ("this CPU has none" in caplog.text) is not expected
    with pytest.raises(ConfigError, match="device=cuda"):
        choose_compute("cuda", "auto")
    assert "float32" in CPU.describe() and "bf16" in Compute(torch.device("cpu"), True).describe()


def test_a_gpu_that_pytorch_has_no_kernels_for(monkeypatch, caplog):
    """Its wheels leave old ones out. Anything else that goes wrong there is no reason to compute elsewhere."""
    said = "CUDA error: no kernel image is available for execution on the device"

    def ones(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")
    monkeypatch.setattr(torch, "ones", ones)
    assert choose_compute("auto", "fp32") == CPU == choose_compute("cpu", "fp32")
    assert len(caplog.messages) == 1 and "has no kernels for this Tesla P100, so the CPU computes" in caplog.text
    with pytest.raises(
        ConfigError, match=r"device=cuda: PyTorch \S+ has no kernels for this Tesla P100; allowed are au"
    ):
        choose_compute("cuda", "fp32")
    said = "CUDA error: out of memory"
    with pytest.raises(RuntimeError, match=said):
        choose_compute("auto", "fp32")


def test_cuda_is_chosen_and_described(cuda):
    assert choose_compute("auto", "auto") == CUDA and CUDA.describe() == "GPU, float32"
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cudnn.allow_tf32
    choose_compute("cuda", "fp32")
    assert not torch.backends.cudnn.allow_tf32
    assert choose_compute("cpu", "fp32").device.type == "cpu"
    with pytest.raises(ConfigError, match="precision=bf16"):
        choose_compute("cuda", "bf16")
    big = torch.zeros(51, dtype=torch.uint8)
    assert CUDA.place(big) is big


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_kernels(cuda, deterministic):
    choose_compute("auto", "auto", deterministic)
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert torch.backends.cudnn.benchmark is not deterministic
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)


NEW_PAGES = """
import resource, torch
from modeling.inference.device import choose_compute
choose_compute("cpu", "fp32")
for _ in range(4):  # until the heap is as large as it gets
    torch.ones(2**26, dtype=torch.uint8)
taken = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**26, dtype=torch.uint8)
    taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(taken) * resource.getpagesize())  # a system that is short of memory may take pages away in between
"""


# Hides no package: what is tested is a setting of glibc's allocator, and other C libraries have none.
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_cpu_takes_no_new_pages_for_blocks_that_it_has_freed():
    """In a process of its own: the heap of one that has run other tests has many shapes."""
    done = subprocess.run([sys.executable, "-c", NEW_PAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**24


def test_other_systems_and_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: object())  # which has no mallopt
    assert choose_compute("cpu", "fp32") == CPU
    monkeypatch.setattr(device.sys, "platform", "win32")
    monkeypatch.setattr(device.ctypes, "CDLL", None)
    assert choose_compute("cpu", "fp32") == CPU


def test_seeding_the_device_is_seeding_torch():
    torch.manual_seed(2**40 + 1)
    expected = torch.rand(3)
    CPU.seed(2**40 + 1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("compute", "wanted", "compiles"),
    [(CPU, False, 0), (CPU, None, 0), (CPU, True, 1), (CUDA, False, 0), (CUDA, None, 1), (CUDA, True, 1)],
)
def test_a_network_is_compiled_if_wanted_and_by_default_on_cuda(compute, wanted, compiles, counter):
    network, x = torch.nn.Linear(1, 1), torch.ones(1, 1)
    forward = compute.compiled(network, wanted)
    assert torch.equal(forward(x), network(x)) and (forward is network) == (not compiles)
    assert counter.frame_count == compiles


@pytest.mark.parametrize(
    ("compute", "replayed", "deterministic", "expected"),
    [
        (CUDA, True, False, {"triton.cudagraphs": True}),
        (CUDA, False, False, None),
        (CUDA, True, True, {"deterministic": True}),
        (CPU, True, False, None),
        (CPU, True, True, {"deterministic": True}),
    ],
)
def test_passes_are_replayed_on_cuda_alone(compute, replayed, deterministic, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic, options: seen.append(options) or function)
    compute.compiled(torch.nn.Linear(1, 1), True, replayed)
    assert seen == [expected]


def test_each_batch_size_is_compiled_for_itself(counter):
    """A compiler that expects sizes to vary gives up the layout of convolutions."""
    forward = CPU.compiled(torch.nn.Linear(3, 3), True)
    for n in (4, 6, 8, 4, 6, 8):
        forward(torch.ones(n, 3))
    assert counter.frame_count == 3


@pytest.mark.parametrize("deterministic", [False, True])
def test_both_passes_are_compiled_to_be_deterministic_if_that_is_wanted(deterministic, monkeypatch, tmp_path, request):
    """A GPU's backward pass is compiled in a thread of autograd, where settings of the main thread do not hold."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing is compiled already
    seen, lower = [], GraphLowering.run

    def run(graph, *inputs):
        seen.append(torch._inductor.config.deterministic)
        return lower(graph, *inputs)

    monkeypatch.setattr(GraphLowering, "run", run)
    compute = choose_compute("cpu", "fp32", deterministic)
    loss = compute.compiled(torch.nn.Linear(3, 3), True)(torch.ones(2, 3)).square().sum()
    backward = threading.Thread(target=loss.backward)
    backward.start()
    backward.join()
    assert seen == [deterministic] * 2


def test_a_failing_compiler_is_one_line_that_names_the_key(monkeypatch, tmp_path):
    """A compiler that is not there, and one that cannot compile this network."""
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/absent/c++",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def fails(graph, inputs):
        raise ValueError("too many registers")

    for backend, reason in (("inductor", ""), (fails, "too many registers")):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
            with pytest.raises(Exception) as raised:
                CPU.compiled(torch.nn.Linear(3, 3), True)(torch.ones(1, 3))
        line = explain(raised.value, "train")
        assert line is not None and line.startswith("torch.compile failed (") and "\n" not in line
        assert reason in line and "trainer.compile=false" in line


def test_a_sampler_with_compile_runs_a_compiled_network(model, counter):
    names = list(model.state_dict())
    assert place_trained(model, sampler(), CPU) is model
    plain = draw_samples(model, sampler(), range(4), (3, 8, 8), CPU)
    assert counter.frame_count == 0
    compiled = place_trained(model, sampler(compile=True), CPU)
    assert torch.equal(draw_samples(compiled, sampler(), range(4), (3, 8, 8), CPU), plain) and plain.float().std() > 1
    assert counter.frame_count > 0 and list(compiled.state_dict()) == names


def test_a_guide_is_compiled_too(counter):
    """In one graph with the network, whose code it shares, and with its own weights."""
    model = build_model(group("model", "tiny", **SMALL), DIFFUSION, (3, 8, 8), 0, 0, has_guide=True).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    guided = sampler(autoguidance_scale=2.0)
    plain, alone = (draw_samples(model, each, range(2), (3, 8, 8), CPU) for each in (guided, sampler()))
    own = model.guide.forward
    place_trained(model, sampler(compile=True), CPU)
    assert model.guide.forward == own  # which is not asked
    compiled = place_trained(model, sampler(compile=True, autoguidance_scale=2.0), CPU)
    assert compiled.guide.forward != own
    found = draw_samples(compiled, guided, range(2), (3, 8, 8), CPU)
    assert torch.equal(found, plain) and not torch.equal(found, alone) and counter.frame_count > 0


@NEEDS_CUDA
def test_cuda_trains_and_samples_as_the_cpu_does(model):
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 9])
    expected = model(x, t, x)
    images = draw_samples(model, sampler(), range(3), (3, 8, 8), CPU)
    compute = choose_compute("cuda", "fp32")
    assert compute.place(torch.zeros(2, dtype=torch.uint8)).is_cuda
    model = compute.place_model(model)
    assert torch.allclose(model(x.cuda(), t.cuda(), x.cuda()).cpu(), expected, rtol=1e-2)  # its convolutions are TF32
    # Their noise is each device's own: only the kind of the result can be compared.
    drawn = draw_samples(model, sampler(), range(3), (3, 8, 8), compute)
    assert drawn.shape == images.shape and drawn.dtype == images.dtype and not drawn.is_cuda
    with choose_compute("cuda", "auto").autocast():
        assert torch.allclose(model(x.cuda(), t.cuda(), x.cuda()).float().cpu(), expected, rtol=0.1)
