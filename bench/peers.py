"""Other packages beside ours, where they are installed: fbgemm-gpu, product-key-memory, fast-weight-product-key-memory,
sparse-delta-memory.

None is a dependency. What is missing, does not load or has no such configuration raises `Absent` and is named in the
report; how each is brought: NOTES.md. (The released FwPKM code: release.py. Plain PyTorch: beside the cases, and
dense_baseline.py.)
"""

import contextlib
import functools
import importlib
import io
import logging

import torch

from bench.cases.case import Absent


def package(name, what=None):
    """The module, quietly: importing one of another version's PyTorch prints pages."""
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.partition(".")[0]):  # a wheel that came without what it needs
            raise Absent(f"does not load here: no module {error.name}") from None
        raise Absent("not installed" if what is None else f"{what} not installed") from None
    except Exception as error:  # a compiled library of another PyTorch raises whatever it likes
        raise Absent(f"does not load here: {type(error).__name__}") from None
    finally:
        logging.disable(logging.NOTSET)


def fbgemm_table(setup, values, lr=0.0):
    """A table of fbgemm-gpu with these values: (slots (N, R), weights (N, R)) -> (N, V); its backward pass is an exact
    SGD step on the rows that were read."""
    operators = "fbgemm_gpu.split_table_batched_embeddings_ops_"
    training = package(operators + "training", "fbgemm-gpu")
    common = package(operators + "common", "fbgemm-gpu")
    configs = package("fbgemm_gpu.split_embedding_configs", "fbgemm-gpu")
    on_gpu = setup.device == "cuda"
    location = common.EmbeddingLocation.DEVICE if on_gpu else common.EmbeddingLocation.HOST
    computes = training.ComputeDevice.CUDA if on_gpu else training.ComputeDevice.CPU
    table = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(*values.shape, location, computes)],
        optimizer=configs.EmbOptimType.EXACT_SGD,
        learning_rate=lr,
        weights_precision=configs.SparseType.FP32,
        output_dtype=configs.SparseType.FP32,
        pooling_mode=common.PoolingMode.SUM,
        device=torch.device(setup.device),
    )
    table.split_embedding_weights()[0].data.copy_(values)

    kind = torch.int32 if on_gpu else torch.int64
    begins = functools.cache(lambda n, r: torch.arange(0, n * r + 1, r, device=setup.device, dtype=kind))
    return lambda slots, weights: table(slots.flatten().to(kind), begins(*slots.shape), weights.flatten())


def product_key_memory(setup, dim, P, H, R, K):
    """PKM of the package product-key-memory, with its own projection and layer norm: (1, N, dim) -> (1, N, dim)"""
    pkm = package("product_key_memory").PKM(dim, heads=H, num_keys=P, topk=R, dim_head=K // 2)
    return pkm.to(setup.device)


def fast_weight_product_key_memory(setup, dim, P, H, R, C):
    """fwPKM of the package of that name, with its own projections; dense, and one memory for each sequence."""
    module = package("fast_weight_product_key_memory").fwPKM(
        dim, heads=H, chunk_size=C, num_memories=P * P, dim_queries_keys=dim, dim_values=dim, topk=R
    )
    return module.to(setup.device)


def sparse_delta_memory(setup, dim, P, R, C, dtype):
    """The layer of sparse-delta-memory 2: one head that writes and reads R of P*P slots a token, and has its own
    projections, gates and learned first rows. (B, T, dim) -> (B, T, dim); only on a GPU, whose kernels it compiles."""
    if not setup.slow_peers:
        raise Absent("no --slow-peers")
    if not setup.sizes.compiled:
        raise Absent("left out of a quick run")
    theirs = package("sparse_delta_memory")
    args = theirs.SparseDeltaMemoryArgs(dim=dim, slots_per_head=P * P, num_writes=R, num_reads=R, chunk_size=C)
    layer = theirs.SparseDeltaMemory(args, layer_id=0).to(setup.device)
    layer.init_weights()
    layer.to(dtype)
    return lambda x: layer(x)[0]


def compiled(setup, function):
    """torch.compile of it, if the sizes of this run allow the time."""
    if not setup.sizes.compiled:
        raise Absent("left out of a quick run")
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)
