"""The CPU backend: each rewrite rule and each patch is needed, and the import order is guarded.

A module of Megatron is loaded a second time with one rule or patch left out; the same call then fails.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from multiprocessing.managers import BaseProxy
from types import ModuleType, SimpleNamespace

import pytest
import torch
from runs import python_path
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mcore_rl.parallel import device, groups, megatron_patches
from mcore_rl.parallel.layout import ParallelLayout

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the backend is for hosts without CUDA")
PATCHES = megatron_patches.WITHOUT_CUDA + megatron_patches.WITHOUT_TRANSFORMER_ENGINE


def megatron(name: str, without: str | None = None) -> ModuleType:
    """A private copy of a module of megatron.core, one rule or patch left out."""
    fullname = f"megatron.core.{name}"
    origin = importlib.util.find_spec(fullname).origin
    rules, patches = ([f for f in functions if f.__name__ != without] for functions in (device.REWRITE_RULES, PATCHES))
    loader = device.MegatronLoader(fullname, origin, rules, patches)
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(fullname, loader, origin=origin))
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def one_rank():
    yield groups.init(ParallelLayout(), timeout_s=30, seed=0)
    groups.destroy()


def current_device(without: str | None) -> Tensor:
    embedding = megatron("models.common.embeddings.rotary_pos_embedding", without)
    return embedding.RotaryEmbedding(
        kv_channels=4, rotary_percent=1.0, cp_group=SimpleNamespace(size=lambda: 1)
    ).inv_freq


def test_torch_cuda():
    assert current_device(None).tolist() == pytest.approx([1.0, 0.01])
    with pytest.raises((AssertionError, RuntimeError)):
        current_device("torch_cuda")


def test_cuda_device():
    assert megatron("optimizer.grad_scaler").ConstantGradScaler(2.0).scale.device.type == "cpu"
    with pytest.raises((AssertionError, RuntimeError)):
        megatron("optimizer.grad_scaler", "cuda_device").ConstantGradScaler(2.0)


def test_tensor_type(one_rank):
    def clipped(without: str | None) -> list[float]:
        weight = torch.nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([3.0, 4.0])
        megatron("optimizer.clip_grads", without).clip_grad_by_total_norm_fp32([weight], max_norm=1.0, total_norm=5.0)
        return weight.grad.tolist()

    assert clipped(None) == pytest.approx([0.6, 0.8], rel=1e-5)
    with pytest.raises(AssertionError):
        clipped("tensor_type")


@pytest.mark.parametrize("rule", ["cuda_method", "pinned_memory"])
def test_cuda_method_and_pinned_memory(rule):
    def of_rank_1(without: str | None) -> list[int]:
        rope = megatron("models.common.embeddings.rope_utils", without)
        two_ranks = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
        return rope.get_pos_emb_on_this_cp_rank(torch.arange(8), 0, two_ranks).tolist()

    assert of_rank_1(None) == [2, 3, 4, 5]
    with pytest.raises((AssertionError, RuntimeError)):
        of_rank_1(rule)


def test_no_compile():
    def double(x):
        return 2 * x

    assert megatron("jit").jit_fuser(double) is double
    assert megatron("jit", "no_compile").jit_fuser is torch.compile


def test_cpu_generator():
    def drawn_twice(without: str | None) -> list[list[float]]:
        random = megatron("tensor_parallel.random", without)
        draws = []
        for noise in (0, 100):  # of the global generator, before the fork
            tracker = random.CudaRNGStatesTracker()
            tracker.add("here", 7)
            torch.rand(noise)
            with tracker.fork("here"):
                draws.append(torch.rand(3).tolist())
        return draws

    first, second = drawn_twice(None)
    assert first == second == torch.rand(3, generator=torch.Generator().manual_seed(7)).tolist()
    try:
        first, second = drawn_twice("cpu_generator")
    except (AssertionError, RuntimeError, IndexError):
        return
    assert first != second


def test_splits_as_numpy():
    def moved(without: str | None):
        moe_utils = megatron("transformer.moe.moe_utils", without)
        return moe_utils.maybe_move_tensor_to_cpu(torch.tensor([2, 0, 5]), as_numpy=True)

    assert not torch.is_tensor(moved(None)) and moved(None).tolist() == [2, 0, 5]
    assert torch.is_tensor(moved("splits_as_numpy"))


def test_latent_attention_linear():
    """Whether a linear is TransformerEngine's can be asked."""

    def is_te(without: str | None) -> bool:
        attention = megatron("transformer.multi_latent_attention", without)
        return attention.HAVE_TE and isinstance(torch.nn.Linear(1, 1), attention.TELinear)

    assert is_te(None) is False
    with pytest.raises(TypeError):
        is_te("latent_attention_linear")


def test_router_gemm():
    def logits(without: str | None) -> list:
        moe_utils = megatron("transformer.moe.moe_utils", without)
        weight = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        return moe_utils.router_gating_linear(torch.tensor([[3.0, 1.0]]), weight, None, torch.float32).tolist()

    assert logits(None) == [[5.0, 1.0]]
    with pytest.raises(NameError):
        logits("router_gemm")


@pytest.fixture
def trained_optimizer(one_rank, monkeypatch):
    """One Megatron distributed optimizer around torch's Adam that has made three steps."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, cuda_graph_scope=[])

    class TwoWeights(MegatronModule):
        def __init__(self) -> None:
            super().__init__(config)
            self.a, self.b = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))

    def build(without: str | None):
        optimizers = megatron("optimizer.distrib_optimizer", without)
        monkeypatch.setattr("megatron.core.optimizer.DistributedOptimizer", optimizers.DistributedOptimizer)
        model = DistributedDataParallel(
            config, DistributedDataParallelConfig(use_distributed_optimizer=True), TwoWeights()
        )
        optimizer = get_megatron_optimizer(OptimizerConfig(lr=0.1, use_distributed_optimizer=True), [model])
        for _ in range(3):
            for weight in model.parameters():
                weight.main_grad.fill_(1.0)
            optimizer.step()
        return optimizer

    return build


def inner_states(optimizer) -> list[dict]:
    return list(optimizer.chained_optimizers[0].optimizer.state.values())


def test_adam_step_unshared(trained_optimizer):
    def reloaded_steps(without: str | None) -> list[float]:
        optimizer = trained_optimizer(without)
        part = optimizer.chained_optimizers[0]
        part.load_state_dict(part.state_dict())
        part.optimizer.step()
        return [float(state["step"]) for state in inner_states(optimizer)]

    assert reloaded_steps(None) == [4.0, 4.0]
    assert reloaded_steps("adam_step_unshared") != [4.0, 4.0]


def test_adam_step_restored(trained_optimizer):
    def restore(without: str | None) -> float:
        part = trained_optimizer(without).chained_optimizers[0]
        weight = next(iter(part.model_param_group_index_map))
        with torch.no_grad():
            saved = {k: v.clone() for k, v in part._get_main_param_and_optimizer_states(weight).items() if k != "step"}
            part._set_main_param_and_optimizer_states(weight, saved)
        return float(part._get_main_param_and_optimizer_states(weight)["step"])

    assert restore(None) == 3.0
    with pytest.raises(KeyError, match="step"):
        restore("adam_step_restored")


UNEVEN = """
import torch, torch.distributed as dist
from tests.unit.test_device import megatron
dist.init_process_group("gloo")
rank, sizes = dist.get_rank(), [3, 1]
mappings = megatron("tensor_parallel.mappings", {without!r})
mine = torch.full((sizes[rank], 2), float(rank + 1))
gathered = mappings._gather_along_first_dim(mine, dist.group.WORLD, sizes)
assert gathered[:, 0].tolist() == [1, 1, 1, 2], gathered
summed = mappings._reduce_scatter_along_first_dim(torch.arange(8.0).view(4, 2) * (rank + 1), dist.group.WORLD, sizes)
assert summed.tolist() == [[[0, 3], [6, 9], [12, 15]], [[18, 21]]][rank], summed
dist.destroy_process_group()
"""


@pytest.mark.parametrize("without", [None, "uneven_gather"])
def test_uneven_gather(tmp_path, without):
    script = tmp_path / "uneven.py"
    script.write_text(UNEVEN.format(without=without))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = python_process([*torchrun, str(script)])
    assert (done.returncode == 0) == (without is None), done.stderr


def python_process(command: list[str]) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": python_path()}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def python(code: str) -> subprocess.CompletedProcess:
    return python_process([sys.executable, "-c", code])


def test_written_in_this_process(tmp_path):
    class Nothing(list):
        def __iter__(self):
            read_by.append(os.getpid())
            return iter(())

    def write(module: ModuleType) -> bool:
        """Whether the results came by another process."""
        results, bucket = module._get_write_results_queue(), (tmp_path / "file", "file", (Nothing(), []))
        module.FileSystemWriterAsync.write_preloaded_data_multiproc([], False, 0, [bucket], results)
        assert results.get() == {0: []} and (tmp_path / "file").exists()
        return isinstance(results, BaseProxy)

    read_by: list[int] = []  # processes, as far as this one learns of them, that went through what is to be written
    name = "dist_checkpointing.strategies.filesystem_async"
    assert not write(megatron(name)) and read_by == [os.getpid()]
    unpatched = megatron(name, "written_in_this_process")
    assert write(unpatched) and read_by == [os.getpid()]
    unpatched._results_queue._manager.shutdown()


def test_megatron_before_the_backend_is_refused():
    done = python("import megatron.core, mcore_rl.parallel")
    assert "import mcore_rl.parallel before anything that imports megatron" in done.stderr


def test_other_release_is_refused():
    done = python("import importlib.metadata as m; m.version = lambda name: '0.17.0'; import mcore_rl.parallel")
    assert "megatron-core 0.17.0 is installed" in done.stderr and "megatron-core==0.16.1" in done.stderr


def test_imports_are_silent_and_leave_torch_alone():
    done = python(
        "import torch; before = dict(vars(torch.cuda))\n"
        "import mcore_rl.model.build, megatron.core.optimizer, megatron.core.distributed\n"
        "assert all(getattr(torch.cuda, name) is value for name, value in before.items())"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_install_twice_is_one_hook():
    before = list(sys.meta_path)
    assert device.install() is True
    assert sys.meta_path == before


def test_rewritten_modules_are_cached_by_source_and_rules(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "module.py"

    def constants(rules):
        loader = device.MegatronLoader("module", str(path), rules, [])
        return [c for c in loader.get_code("module").co_consts if isinstance(c, str)]

    path.write_text('a = "cuda"\n')
    assert constants([device.cuda_device]) == ["cpu"] and constants([device.cuda_method]) == ["cuda"]
    first, second = (tmp_path / "__pycache__").iterdir()
    assert constants([device.cuda_device]) == ["cpu"]
    path.write_text('b = "cuda", "b"\n')
    assert constants([device.cuda_device]) != ["cpu"], "another source is compiled again, whatever its time stamp"
    for file in (first, second):
        file.write_bytes(file.read_bytes()[:10])
    assert constants([device.cuda_method]) != ["cpu"], "a cache that is cut off is not read"
    assert len(list((tmp_path / "__pycache__").iterdir())) == 2


def test_with_cuda_and_transformer_engine_nothing_is_installed():
    done = python(
        "import sys, torch, types\n"
        "torch.cuda.is_available = lambda: True\n"
        "sys.modules['transformer_engine'] = module = types.ModuleType('transformer_engine')\n"
        "module.__spec__ = types.SimpleNamespace()\n"
        "before = list(sys.meta_path)\n"
        "from mcore_rl.parallel import device\n"
        "assert device.install() is False and sys.meta_path == before"
    )
    assert done.returncode == 0, done.stderr


def test_norms_of_all_at_once():
    """One operation for all tensors, the same norm and product, and no number that waits for the device."""

    def norm_and_scaled(without: str | None) -> tuple[float, list[float], int]:
        utils, tensors = megatron("utils", without), [torch.tensor([3.0]), torch.tensor([4.0, 12.0])]
        with Counted() as counted:
            norm, _ = utils.local_multi_tensor_l2_norm(0, None, [tensors], False)
            utils.local_multi_tensor_scale(0, None, [tensors, tensors], 0.5)
        return norm.item(), torch.cat(tensors).tolist(), counted.of("aten._local_scalar_dense.default")

    assert norm_and_scaled(None) == (13.0, [1.5, 2.0, 6.0], 0)
    assert norm_and_scaled("norms_of_all_at_once")[2] > 0


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[8], [16, 8, 24], [8] * 9])
def test_rotary_of_a_pack_at_once(cp_size, lengths):
    """Every context rank turns its tokens as Megatron does sequence by sequence, by fewer operations."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    freqs = torch.rand(max(lengths), 1, 1, 4)
    for cp_rank in range(cp_size):
        t = torch.rand(sum(lengths) // cp_size, 2, 6)
        group = SimpleNamespace(size=lambda: cp_size, rank=lambda r=cp_rank: r)
        found, counts = [], []
        for without in (None, "rotary_of_a_pack_at_once"):
            rope = megatron("models.common.embeddings.rope_utils", without)
            with Counted() as counted:
                found.append(rope._apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, cp_group=group))
            counts.append(counted.of("aten.slice.Tensor"))
        assert torch.equal(*found)
        assert counts[0] <= 6 and (counts[1] > counts[0] or len(lengths) == 1)


class Counted(TorchDispatchMode):
    """The names of the operations that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> int:
        return self.names.count(name)
