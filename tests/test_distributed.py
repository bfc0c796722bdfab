"""Two processes: DDP and FSDP2 share the slow weights, every process has a memory of its own."""

import contextlib
import datetime
import multiprocessing
import os
import traceback

import pytest
import torch
from torch import distributed, nn

from fwpkm_cuda import PKM, FwPKM

if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

RANKS, STEPS, WIDTH, T = 2, 3, 8, 24
SIZES = dict(key_dim=8, value_dim=6, topk=3, num_sub_keys=8, chunk_size=8)


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(FwPKM(WIDTH, **SIZES | options) for _ in range(2))
        self.pkm = PKM(WIDTH, key_dim=4, value_dim=6, heads=2, topk=2, num_sub_keys=6)

    def forward(self, hidden, memories):
        hidden = self.before(hidden)
        for layer, memory in zip(self.layers, memories, strict=True):
            hidden = hidden + layer(hidden, memory)
        return hidden + self.pkm(hidden)

    def stream(self, hidden, memories):
        hidden = self.before(hidden)
        for layer, memory in zip(self.layers, memories, strict=True):
            hidden = hidden + layer.stream(hidden, memory, flush=True)
        return hidden + self.pkm(hidden)


def make(dtype=torch.float64, **options):
    """The same in every process."""
    torch.manual_seed(3)
    model = Model(**options).to(dtype)
    return model, new_memories(model)


def new_memories(model):
    return [layer.new_memory(**{} if layer.initial_values is not None else dict(seed=5)) for layer in model.layers]


def data(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(2, T, WIDTH, generator=generator, dtype=torch.float64)


def tensors(memories):
    return [t.detach().clone() for m in memories for t in m.tensors.values()]


def whole(t):
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def loss_of(model, hidden, memories):
    return model(hidden, memories).sin().sum()


def steps(model, memories, rank, no_sync=None):
    """Some steps of SGD; with no_sync two micro-batches each, the first without communication. -> what came of them"""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    gradients = []
    for step in range(STEPS):
        optimizer.zero_grad()
        if no_sync is not None:
            with no_sync():
                loss_of(model, data(rank, step + 50), memories).backward()
        loss_of(model, data(rank, step), memories).backward()
        gradients.append([whole(p.grad) for p in model.parameters()])
        optimizer.step()
        for memory in memories:
            memory.commit()
    return dict(
        gradients=gradients,
        parameters=[whole(p) for p in model.parameters()],
        memories=tensors(memories),
        keys=list(model.state_dict()),
    )


# ------------------------------------------------------------------------------------------- what the processes compute
def ddp(rank):
    model, memories = make()
    return steps(nn.parallel.DistributedDataParallel(model), memories, rank)


def ddp_accumulates(rank):
    model, memories = make()
    model = nn.parallel.DistributedDataParallel(model)
    return steps(model, memories, rank, no_sync=model.no_sync)


def ddp_learned(rank):
    """Every sequence begins with the learned initial memory, whose gradients are dense here."""
    model, memories = make(learned_initial_memory=True, sparse_grad=False)
    model = nn.parallel.DistributedDataParallel(model)
    loss_of(model, data(rank, 0), memories).backward()
    return dict(gradients=[[p.grad.clone() for p in model.parameters()]])


def shard(model, pkm_options=None, **options):
    from torch.distributed.fsdp import fully_shard

    mesh = distributed.device_mesh.init_device_mesh("cpu", (RANKS,))
    fully_shard(model.pkm, mesh=mesh, **pkm_options or {})
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh, **options)
    return model


def can_shard(rank):
    """Of torch alone: whether FSDP2 works on this kind of device."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(nn.Linear(4, 4), mesh=distributed.device_mesh.init_device_mesh("cpu", (RANKS,)))
    model(torch.randn(2, 4)).sum().backward()
    return dict(gradients=[[whole(p.grad) for p in model.parameters()]])


def fsdp(rank):
    model, _ = make()
    model = shard(model)
    shares = [p.to_local().numel() / p.numel() for p in model.parameters()]
    return steps(model, new_memories(model), rank) | dict(shares=shares)


def fsdp_stream(rank):
    from torch.distributed.fsdp import register_fsdp_forward_method

    model, _ = make()
    model = shard(model)
    for part in (*model.layers, model):
        register_fsdp_forward_method(part, "stream")
    memories = new_memories(model)
    with torch.no_grad():
        out = model.stream(data(rank, 0), memories)
    return dict(out=out, memories=tensors(memories))


def fsdp_mixed(rank):
    """Projections in bfloat16; the tables of PKM, and with them its projections, in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model, _ = make(dtype=torch.float32)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    single = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.bfloat16)
    model = shard(model, mp_policy=half, pkm_options=dict(mp_policy=single))
    memories = new_memories(model)
    y = model(data(rank, 0).float(), memories)
    y.float().sin().sum().backward()
    for memory in memories:
        memory.commit()
    return dict(out=y.detach(), gradients=[whole(p.grad) for p in model.parameters()], memories=tensors(memories))


WORK = (ddp, ddp_accumulates, ddp_learned, can_shard, fsdp, fsdp_stream, fsdp_mixed)


def process(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    for work in WORK:
        try:
            result = work(rank)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, folder / f"{work.__name__}{rank}")
    distributed.barrier()
    distributed.destroy_process_group()
    # Without PyTorch's teardown: on a busy machine a thread of it was seen to outlive the statics of the process, which
    # was "terminate called without an active exception" after all work was done.
    os._exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results(name) -> what each process computed; they are started once for all tests"""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=process, args=(rank, folder), daemon=True) for rank in range(RANKS)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(240)
    assert [p.exitcode for p in processes] == [0] * RANKS

    def of(name):
        result = [torch.load(folder / f"{name}{rank}", weights_only=True) for rank in range(RANKS)]
        failed = [r for r in result if isinstance(r, str)]
        assert not failed, failed[0]
        return result

    return of


# ----------------------------------------------------------------------------------------- the same, in one process
def alone(no_sync=None):
    """The steps of all processes one after the other: one model, a memory per rank, gradients averaged by hand."""
    model, _ = make()
    memories = [new_memories(model) for _ in range(RANKS)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    gradients = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(RANKS):
            for batch in [step] if no_sync is None else [step + 50, step]:
                (loss_of(model, data(rank, batch), memories[rank]) / RANKS).backward()
            for memory in memories[rank]:
                memory.commit()
        gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    parameters = [p.detach().clone() for p in model.parameters()]
    return gradients, parameters, [tensors(m) for m in memories]


def assert_as_alone(found, no_sync=None):
    gradients, parameters, memories = alone(no_sync)
    close = dict(rtol=1e-9, atol=1e-11)
    for rank, result in enumerate(found):
        torch.testing.assert_close(result["gradients"], gradients, **close)
        torch.testing.assert_close(result["parameters"], parameters, **close)
        torch.testing.assert_close(result["memories"], memories[rank], **close)
    for a, b in zip(*(r["memories"] for r in found), strict=True):
        assert (a - b).norm() > 1e-3 * a.norm(), "each process has seen other data"
    before = tensors(make()[1])
    assert all((a - b).norm() > 1e-3 * a.norm() for a, b in zip(memories[0], before, strict=True))


# --------------------------------------------------------------------------------------------------------------- DDP
def test_ddp_averages_gradients_and_leaves_each_process_its_memory(results):
    assert_as_alone(results("ddp"))


def test_ddp_accumulates_gradients_without_communication(results):
    assert_as_alone(results("ddp_accumulates"), no_sync=contextlib.nullcontext)


def test_ddp_saves_no_memory(results):
    for result in results("ddp"):
        assert result["keys"] == [f"module.{name}" for name in make()[0].state_dict()]


def test_ddp_averages_the_dense_gradients_of_a_learned_initial_memory(results):
    model, _ = make(learned_initial_memory=True, sparse_grad=False)
    for rank in range(RANKS):
        memories = [layer.new_memory() for layer in model.layers]
        (loss_of(model, data(rank, 0), memories) / RANKS).backward()
    assert model.layers[0].initial_values.grad.any()
    for result in results("ddp_learned"):
        torch.testing.assert_close(result["gradients"], [[p.grad for p in model.parameters()]])


# ------------------------------------------------------------------------------------------------------------- FSDP2
@pytest.fixture
def sharded(results):
    try:
        results("can_shard")
    except AssertionError as error:
        pytest.skip(f"this torch has no FSDP2 on CPUs: {str(error).splitlines()[-1]}")
    return results


def test_fsdp_averages_gradients_and_leaves_each_process_its_memory(sharded):
    found = sharded("fsdp")
    assert_as_alone(found)
    for result in found:
        assert result["keys"] == [*make()[0].state_dict()]
    assert all(share == 0.5 for result in found for share in result["shares"]), "the slow weights are shared out"


def test_a_sharded_layer_streams_once_stream_is_registered_as_a_forward_method(sharded):
    for rank, result in enumerate(sharded("fsdp_stream")):
        model, memories = make()
        with torch.no_grad():
            out = model.stream(data(rank, 0), memories)
        assert torch.equal(result["out"], out)
        assert all(torch.equal(a, b) for a, b in zip(result["memories"], tensors(memories), strict=True))


def test_fsdp_in_bfloat16_keeps_the_memory_in_float32(sharded):
    model, _ = make(dtype=torch.float32)
    memories = [new_memories(model) for _ in range(RANKS)]
    outs = [model(data(rank, 0).float(), memories[rank]) for rank in range(RANKS)]
    (sum(y.sin().sum() for y in outs) / RANKS).backward()
    for rank, result in enumerate(sharded("fsdp_mixed")):
        assert result["out"].dtype == torch.bfloat16
        assert (result["out"].float() - outs[rank]).norm() < 0.1 * outs[rank].norm()
        for memory in memories[rank]:
            memory.commit()
        for found, expected in zip(result["memories"], tensors(memories[rank]), strict=True):
            assert found.dtype == torch.float32
            assert (found - expected).norm() < 0.1 * expected.norm()
        found, expected = (torch.cat([g.flatten() for g in all_of]) for all_of in (
            result["gradients"], [p.grad for p in model.parameters()],
        ))  # fmt: skip
        assert found.isfinite().all() and (found - expected).norm() < 0.3 * expected.norm()
