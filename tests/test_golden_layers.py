"""Parity with the released code of whole layers: FwPKM with its projections and gate, PKM and FwMLP.

The released parameter names are on the right of PARAMETERS. Left out: outer_loss, the sum of output * r."""

import pytest
import torch
import torch.nn.functional as F
from golden_files import GOLDEN, TOLERANCE, assert_close
from inputs import randn
from released_stream import Queue, pieces, released_stream

import fwpkm_cuda
from fwpkm_cuda.fast_mlp import MLPMemory, MLPWeights, mlp_loss, mlp_read, mlp_write

pytestmark = pytest.mark.usefixtures("device")

LAYERS = [golden for golden in GOLDEN if golden.config["kind"] == "layer"]
PKMS = [golden for golden in GOLDEN if golden.config["kind"] == "pkm"]
MLPS = [golden for golden in GOLDEN if golden.config["kind"] == "fwmlp"]

NORMS = {"zero_mean": "zscore", "l2norm": "l2", None: None}
PARAMETERS = {
    "layer": {
        "query_norm": "fw_q_norm",
        "query_proj": "fw_q_proj",
        "value_norm": "fw_v_norm",
        "value_proj": "fw_v_proj",
        "gate_norm": "fw_out_gate_norm",
        "gate_proj": "fw_out_gate",
        "out_norm": "fw_out_norm",
        "out_proj": "fw_out_proj",
    },
    "pkm": {
        "sub_keys": "keys",
        "values": "values__weight",
        "up_values": "values_u__weight",
        "query_proj": "query_proj__query_mlps__0",
        "query_norm": "query_proj__norm",
        "out_proj": "value_proj",
        "swilu_proj": "swilu_projection",
        "gate_proj": "gating",
    },
}


def ids(goldens):
    return [pytest.param(golden, id=golden.stem) for golden in goldens]


def released_name(kind, name):
    """Of the parameter `name` of our module."""
    module, _, leaf = name.partition(".")
    return PARAMETERS[kind][module] + (f"__{leaf}" if leaf else "")


def with_released_parameters(module, golden):
    """`module` with the parameters of the file; all of them are used."""
    kind = golden.config["kind"]
    used = set()
    for name, parameter in module.named_parameters():
        if not name.startswith("initial_"):
            released = f"param_{released_name(kind, name)}"
            used.add(released)
            with torch.no_grad():
                parameter.copy_(golden.arrays[released].view_as(parameter))
    assert used | {"param_fwpkm__keys", "param_fwpkm__values"} >= {n for n in golden.arrays if n.startswith("param_")}
    return module


def assert_gradients(module, golden, tolerance):
    kind, compared = golden.config["kind"], 0
    for name, parameter in module.named_parameters():
        if not name.startswith("initial_"):
            expected = golden.arrays[f"grad_{released_name(kind, name)}"]
            gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            assert_close(f"gradient of {name}", gradient.view_as(expected), expected, tolerance)
            compared += 1
    assert compared


# ------------------------------------------------------------------------------------------------------------- FwPKM
def released_layer(golden):
    """The layer and a memory of a file, the latter as a learned initial memory so that it has gradients."""
    c = golden.config
    gates = {(True, True): "output_and_loss", (True, False): "output", (False, False): "none"}
    layer = fwpkm_cuda.FwPKM.released(
        c["hidden"],
        key_dim=c["k_dim"],
        value_dim=c["v_dim"],
        heads=c["heads"],
        topk=c["topk"],
        num_sub_keys=c["n_subkeys"],
        chunk_size=c["chunk"],
        lookahead=c["lookahead"],
        score={"idw": "idw", "dot_product": "dot"}[c["score"]],
        lr=c["lr"],
        weight_decay=c["weight_decay"],
        values_only=c["values_only"],
        addressing_weight=c["addr_weight"] if c["addr_loss"] else 0.0,
        gate=gates[c["out_gate"], c["weight_loss_with_gates"]],
        target_norm=NORMS[c["compress_value"]],
        query_norm=NORMS[c["compress_query"]],
        norm_eps=c["rms_eps"],
        learned_initial_memory=True,
    )
    with_released_parameters(layer, golden)
    with torch.no_grad():
        layer.initial_values.copy_(golden.arrays["param_fwpkm__values"])
        layer.initial_sub_keys.copy_(golden.arrays["param_fwpkm__keys"].view_as(layer.initial_sub_keys))
    return layer, layer.new_memory()


def assert_memory(golden, values, sub_keys):
    tolerance = TOLERANCE["float32"]["outputs"]
    assert_close("values1", values, golden.arrays["values1"], tolerance)
    assert_close("keys1", sub_keys.reshape(golden.arrays["keys1"].shape), golden.arrays["keys1"], tolerance)


@pytest.mark.parametrize("golden", ids([g for g in LAYERS if g.config["mode"] != "stream"]))
def test_layer_matches_every_array(golden):
    layer, memory = released_layer(golden)
    a, tolerance = golden.arrays, TOLERANCE["float32"]
    hidden = a["hidden"].clone().requires_grad_()
    mask = a["mask"] > 0 if "mask" in a else None
    branch, details = layer(hidden, memory, mask, return_details=True)
    assert_close("memory_branch", branch, a["memory_branch"], tolerance["outputs"])
    assert_close("hidden_out", hidden + branch, a["hidden_out"], tolerance["outputs"])
    assert_close("gates", details.gates.unsqueeze(-1), a["gates"], tolerance["outputs"])
    assert torch.equal(details.indices.long(), a["indices"].long())
    assert_close("scores", details.weights, a["scores"], tolerance["outputs"])
    assert_close("losses", details.losses, a["losses"], tolerance["outputs"])
    ((hidden + branch) * a["r"]).sum().backward()
    assert_close("gradient of hidden", hidden.grad, a["grad_hidden"], tolerance["gradients"])
    assert_gradients(layer, golden, tolerance["gradients"])
    sub_keys = layer.initial_sub_keys.grad.reshape(a["grad_fwpkm__keys"].shape)
    assert_close("gradient of sub_keys", sub_keys, a["grad_fwpkm__keys"], tolerance["gradients"])
    assert layer.initial_values.grad.is_sparse
    values = layer.initial_values.grad.to_dense()
    assert_close("gradient of values", values, a["grad_fwpkm__values"], tolerance["gradients"])
    memory.commit()
    assert_memory(golden, memory.values, memory.sub_keys)


@pytest.mark.parametrize("golden", ids([g for g in LAYERS if "stat_kld" in g.arrays]))
def test_statistics_match_the_release(golden):
    a = golden.arrays
    found = fwpkm_cuda.usage(a["indices"], golden.config["n_subkeys"] ** 2)
    for name, actual in zip(("collision_ratio", "coverage_ratio", "kld"), found, strict=True):
        assert_close(name, torch.tensor(actual), a[f"stat_{name}"], 1e-5)
    layer, memory = released_layer(golden)
    _, details = layer(a["hidden"], memory, a["mask"] > 0 if "mask" in a else None, return_details=True)
    assert_close("addressing loss", details.addressing_loss.mean(), a["stat_addressing_loss_me"], 1e-5)


@pytest.mark.parametrize("golden", ids([g for g in LAYERS if g.config["mode"] == "stream"]))
@torch.no_grad()
def test_layer_around_the_released_stream_matches_every_array(golden):
    """The released streaming schedule is not ours (released_stream.py), the layer around it is."""
    layer, memory = released_layer(golden)
    a = golden.arrays
    options = {k: v for k, v in layer.options.items() if k not in ("eps", "write_rule", "boundary")}
    queue = Queue(memory.values, memory.sub_keys)
    branches, gates, indices = [], [], []
    for hidden in a["hidden"].split(golden.config["segments"], 1):
        projected = layer.project(hidden)
        reading, queue = released_stream(queue, projected.query, projected.value, projected.gate, **options)
        branches.append(layer.combine(reading.out, projected.value, projected.gate))
        gates.append(projected.gate)
        indices.append(reading.indices)
    tolerance = TOLERANCE["float32"]["outputs"]
    assert_close("hidden_out", a["hidden"] + torch.cat(branches, 1), a["hidden_out"], tolerance)
    assert_close("gates", torch.cat(gates, 1).unsqueeze(-1), a["gates"], tolerance)
    assert torch.equal(torch.cat(indices, 1), a["indices"].long())
    assert_memory(golden, queue.values, queue.sub_keys)


# --------------------------------------------------------------------------------------------------------------- PKM
@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("golden", ids([g for g in PKMS if not g.config["peer_variant"]]))
def test_pkm_matches_every_array(golden, sparse_grad):
    c, a = golden.config, golden.arrays
    layer = fwpkm_cuda.PKM(
        c["input_dim"],
        c["output_dim"],
        key_dim=c["mem_k_dim"],
        value_dim=c["mem_v_dim"],
        heads=c["mem_heads"],
        topk=c["mem_knn"],
        num_sub_keys=c["mem_n_keys"],
        query_norm=c["mem_query_rmsnorm"],
        swilu=c["swilu_projection"],
        gated=c["mem_gated"],
        sparse_grad=sparse_grad,
        dtype=getattr(torch, c["dtype"]),
    )
    with_released_parameters(layer, golden)
    x = a["x"].clone().requires_grad_()
    y, indices = layer(x, return_indices=True)
    # its softmax is float32 in any case
    tolerance = TOLERANCE["float64, entropy in float32" if c["dtype"] == "float64" else "float32"]
    assert torch.equal(indices.flatten(-2).long(), a["indices"].long())
    assert_close("output", y, a["output"], tolerance["outputs"])
    (y * a["r"]).sum().backward()
    assert layer.values.grad.is_sparse == sparse_grad
    assert_close("gradient of x", x.grad, a["grad_x"], tolerance["gradients"])
    assert_gradients(layer, golden, tolerance["gradients"])


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_peer_variant_is_its_formula(sparse_grad):
    """sum over the slots read of softmax(z)_s gelu(<x, u_s>) v_s, with gradients."""
    torch.manual_seed(1)
    layer = fwpkm_cuda.PKM(
        6, key_dim=8, heads=2, topk=3, num_sub_keys=5, peer=True, sparse_grad=sparse_grad, dtype=torch.float64
    )
    x = randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    y, indices = layer(x, return_indices=True)

    query = layer.query_norm(layer.query_proj(x)).unflatten(-1, (2, 2, 4))
    scores = torch.einsum("bthpk,hpjk->bthpj", query, layer.sub_keys)
    pairs = (scores[..., 0, :, None] + scores[..., 1, None, :]).flatten(-2).gather(-1, indices.long())
    experts = F.gelu(torch.einsum("btd,bthrd->bthr", x, layer.up_values[indices.long()]))
    expected = torch.einsum("bthr,bthr,bthrd->btd", pairs.softmax(-1), experts, layer.values[indices.long()])
    assert_close("output", y, expected, 1e-13)

    leaves = [x, *layer.parameters()]
    direction = torch.randn_like(y)
    actual = torch.autograd.grad((y * direction).sum(), leaves)
    assert [g.is_sparse for (n, _), g in zip(layer.named_parameters(), actual[1:]) if n in ("values", "up_values")] == [
        sparse_grad
    ] * 2
    for found, gradient in zip(actual, torch.autograd.grad((expected * direction).sum(), leaves), strict=True):
        assert_close("gradient", found.to_dense() if found.is_sparse else found, gradient, 1e-13)


# ------------------------------------------------------------------------------------------------------------- FwMLP
def mlp_inputs(golden):
    """weights (leaves), query, target, mask and the options of mlp_scan"""
    c, a = golden.config, golden.arrays
    weights = MLPWeights(*(a[f"{name}_0"].clone().requires_grad_() for name in MLPWeights._fields))
    options = dict(chunk_size=c["chunk"], lookahead=c["lookahead"], lookahead_target=c["strategy"], loss=c["loss"])
    options |= dict(lr=c["lr"], weight_decay=c["weight_decay"], grad_clip=1.0 if c["grad_clip"] else None)
    return weights, a["q"].clone(), a["ref_v"].clone(), a["mask"] > 0 if "mask" in a else None, options


def assert_mlp_weights(golden, weights):
    tolerance = TOLERANCE[golden.config["dtype"]]["outputs"]
    for name, w in zip(MLPWeights._fields, weights, strict=True):
        assert_close(f"{name}_1", w, golden.arrays[f"{name}_1"], tolerance)


@pytest.mark.parametrize("golden", ids([g for g in MLPS if g.config["mode"] != "stream"]))
def test_fast_mlp_matches_every_array(golden):
    a, tolerance = golden.arrays, TOLERANCE[golden.config["dtype"]]
    weights, query, target, mask, options = mlp_inputs(golden)
    memory = MLPMemory(*weights)
    leaves = dict(q=query.requires_grad_(), ref_v=target.requires_grad_())
    scan = memory.scan(query, target, mask=mask, **options)
    assert_close("output", scan.out, a["output"], tolerance["outputs"])
    assert_close("losses", scan.losses, a["losses"], tolerance["outputs"])
    leaves |= {f"{name}_0": w for name, w in weights._asdict().items()}
    gradients = torch.autograd.grad((scan.out * a["r"]).sum(), leaves.values())
    for name, gradient in zip(leaves, gradients, strict=True):
        assert_close(f"gradient of {name}", gradient, a[f"grad_{name}"], tolerance["gradients"])
    memory.commit()
    assert_mlp_weights(golden, memory.weights)
    for name, w in weights._asdict().items():
        assert torch.equal(w, a[f"{name}_0"])  # the leaves are not written


@pytest.mark.parametrize("golden", ids([g for g in MLPS if g.config["mode"] == "stream"]))
def test_fast_mlp_in_the_released_stream_matches_every_array(golden):
    """Its schedule (released_stream.pieces): a piece is read and queued; with C tokens in the queue the weights are
    updated once, and the queue keeps its last L tokens."""
    a, tolerance = golden.arrays, TOLERANCE[golden.config["dtype"]]["outputs"]
    weights, query, target, mask, options = mlp_inputs(golden)
    assert mask is None
    chunk_size, lookahead = options.pop("chunk_size"), options["lookahead"]
    kind = {name: options.pop(name) for name in ("lookahead", "lookahead_target", "loss")}
    outs, q, t, start = [], query[:, :0], target[:, :0], 0
    for i, tokens in enumerate(golden.config["segments"]):
        losses = []
        for size in pieces(tokens, q.shape[1], chunk_size, lookahead):
            new = slice(start, start + size)
            outs.append(mlp_read(weights, query[:, new]).detach())
            q, t, start = torch.cat((q, query[:, new]), 1), torch.cat((t, target[:, new]), 1), start + size
            if q.shape[1] >= chunk_size:
                losses.append(mlp_loss(mlp_read(weights, q), t, **kind))
                weights = mlp_write(weights, losses[-1], **options)
                weights = MLPWeights(*(w.detach().requires_grad_() for w in weights))
                q, t = q[:, q.shape[1] - lookahead :], t[:, t.shape[1] - lookahead :]
        assert bool(losses) == (f"losses_seg{i}" in a)
        if losses:
            assert_close(f"losses_seg{i}", torch.cat(losses, 1), a[f"losses_seg{i}"], tolerance)
        assert q.shape[1] == int(a["queue_len_after_seg"][i])
    assert_close("output", torch.cat(outs, 1), a["output"], tolerance)
    assert_mlp_weights(golden, weights)


@pytest.mark.cpu
def test_every_file_of_a_layer_is_read_by_a_test():
    assert LAYERS and PKMS and MLPS
    assert {golden.config["kind"] for golden in GOLDEN} <= {"fwpkm", "layer", "pkm", "fwmlp"}
