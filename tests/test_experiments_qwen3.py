"""experiments/qwen3_next.py: the paper's model, in tiny sizes."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fwpkm_cuda import PKM, FwMLP, FwPKM, Memories

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "experiments").is_dir(), reason="the tests run away from the source tree")
transformers = pytest.importorskip("transformers")
WORDS, WINDOW, CHUNK, T = 50, 8, 8, 35
SIZES = dict(key_dim=8, value_dim=8, topk=2, num_sub_keys=8)
KINDS = {
    "none": dict(fwpkm=()),
    "PKM": dict(fwpkm=(), pkm=(0, 3)),
    "FwPKM": dict(fwpkm=(1, 3)),  # layer 3 has attention in all layouts but one
    "both": dict(fwpkm=(1, 3), pkm=(1, 2)),
    "FwMLP": dict(fwpkm=(), fwmlp=(1, 3)),
}
LAYOUTS = pytest.mark.parametrize("layout", ["gdn", "gdn+swa", "gdn+fa", "fa"])
ATTENTION = pytest.mark.parametrize("layout", ["gdn+fa", "fa"])


@pytest.fixture(autouse=True)
def source_tree(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def configuration(layout="gdn+fa", kind="none", **changes):
    from experiments.config import Config

    options = dict(
        fwpkm_options=SIZES | dict(chunk_size=CHUNK),
        fwmlp_options=dict(key_dim=8, value_dim=8, hidden_units=16, chunk_size=CHUNK),
        pkm_options=SIZES | dict(heads=2),
    )
    sizes = dict(layers=4, hidden=32, heads=4, mlp=48, window=WINDOW)
    return Config(backbone="qwen3-next", layout=layout, **options, **(sizes | KINDS[kind] | changes))


def make(*args, **changes):
    """A model, its memories, ids. Its weights are larger than transformers draws them, or no layer would say much."""
    from experiments.backbone import language_model

    model = language_model(configuration(*args, **changes), WORDS)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2 and weight.std() < 0.03:
                weight.mul_(8)
    return model, Memories.of(model, seed=1), torch.randint(WORDS, (2, T))


def train(model, memories, ids, **options):
    """-> logits, gradients by name"""
    model.zero_grad()
    logits = model(ids[:, :-1], memories, **options)
    F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def bits(memories):
    return [t.clone() for memory in memories.values() for t in memory.tensors.values()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def in_pieces(model, memories, ids, lengths, **options):
    cache = model.new_cache()
    return torch.cat([model(piece, memories, cache=cache, **options) for piece in ids.split(lengths, 1)], 1)


def changed(ids, j):
    """The same texts with another token j."""
    other = ids.clone()
    other[:, j] = (other[:, j] + 1) % WORDS
    return other


def mute(model):
    """Leaves attention as the only thing that mixes tokens."""
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.out_proj.weight.zero_()


# ------------------------------------------------------------------------------------------------------------ training
@LAYOUTS
@pytest.mark.parametrize("kind", KINDS)
def test_each_layout_trains_with_each_kind_of_memory(layout, kind):
    model, memories, ids = make(layout, kind)
    config, layers, details = configuration(layout, kind), model.model.layers, {}
    for i, layer in enumerate(layers):
        fast = FwPKM if i in config.fwpkm else FwMLP if i in config.fwmlp else type(None)
        assert isinstance(layer.memory, fast) and isinstance(layer.mlp, PKM) == (i in config.pkm)
        attends = layout == "fa" or (layout != "gdn" and i == 3)
        assert hasattr(layer, "self_attn") == attends and hasattr(layer, "linear_attn") == (not attends)
    assert list(memories) == [f"model.layers.{i}.memory" for i in (*config.fwpkm, *config.fwmlp)]
    before = bits(memories)
    logits, gradients = train(model, memories, ids, details=details)
    assert logits.shape == (2, T - 1, WORDS) and logits.isfinite().all()
    silent = [name for name, g in gradients.items() if not g.isfinite().all() or not g.any()]
    assert not silent and gradients.keys() == dict(model.named_parameters()).keys()
    assert details.keys() == memories.keys() and same(bits(memories), before)
    memories.commit()
    assert all(not torch.equal(a, b) for a, b in zip(bits(memories), before))


@LAYOUTS
@pytest.mark.parametrize("kind", ["FwPKM", "FwMLP"])
@torch.no_grad()
def test_a_memory_stands_in_front_of_the_token_mixer(layout, kind):
    model, memories, ids = make(layout, kind)
    memories = memories.frozen()
    for i, layer in enumerate(model.model.layers):
        seen = []
        layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        layer.input_layernorm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(ids, memories)
        into_layer, into_mixer = seen
        if i in (1, 3):
            into_layer = into_layer + layer.memory(into_layer, memories[f"model.layers.{i}.memory"])
        assert torch.equal(into_layer, into_mixer)


@LAYOUTS
@pytest.mark.parametrize("kind", ["both", "FwMLP"])
def test_checkpointing_runs_each_layer_twice_and_changes_nothing(layout, kind):
    results, runs = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, memories, ids = make(layout, kind, checkpointing=checkpointing)
        calls, details = [], {}
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(0))
        for _ in range(2):
            logits, gradients = train(model, memories, ids, details=details, restricted=True)
            memories.commit()
        losses = [d.losses for d in details.values()]
        results.append([logits, *gradients.values(), *losses, *bits(memories), *model.buffers()])
        runs.append(len(calls))
    assert runs == [2 * 4, 4 * 4]
    if kind == "both":
        assert same(*results)
    else:  # whose first, graphless run rounds otherwise
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_checkpointing_leaves_texts_in_pieces_and_evaluation_alone():
    model, memories, ids = make(kind="FwPKM", checkpointing=True)
    whole = model(ids, memories.frozen())
    torch.testing.assert_close(in_pieces(model, memories.frozen(), ids, 12), whole, atol=1e-4, rtol=0)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(0))
    model.eval()(ids, memories.frozen()).sum().backward()
    assert len(calls) == 1


@LAYOUTS
@pytest.mark.parametrize("kind", ["none", "both", "FwMLP"])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_autocast(layout, kind):
    model, memories, ids = make(layout, kind)
    exact, _ = train(model, memories.frozen(), ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradients = train(model, memories.frozen(), ids)
        with torch.no_grad():
            pieces = in_pieces(model, memories.frozen().streaming(), ids[:, :-1], [13, 20, 1])
        train(model, memories, ids)
        memories.commit()
    assert logits.dtype == pieces.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in bits(memories))
    most = 0.25 if kind == "both" else 0.05  # some tokens read other slots
    for other in (logits, pieces):
        assert 0 < (other.float() - exact).abs().mean() < most * exact.abs().mean()


def test_a_compiled_training_step_is_one_graph():
    model, memories, ids = make("gdn+swa", "both")
    twin, details = memories.clone(), {}
    logits, gradients = train(model, memories, ids)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    model.zero_grad()
    again = compiled(ids[:, :-1], twin, details=details)
    F.cross_entropy(again.flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert torch.equal(logits, again) and details.keys() == memories.keys()
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    memories.commit(), twin.commit()
    assert same(bits(memories), bits(twin))


# --------------------------------------------------------------------------------------------------------- transformers
def written_by_transformers(model):
    other = transformers.Qwen3NextForCausalLM(model.model.config)
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    other.tie_weights()
    other.set_attn_implementation("sdpa")
    return other


@LAYOUTS
@pytest.mark.parametrize("restricted", [False, True], ids=["", "restricted"])
@torch.no_grad()
def test_transformers_own_model_has_the_same_logits(layout, restricted):
    model, _, ids = make(layout)
    logits = model(ids, {}, restricted=restricted)
    back = torch.arange(T)[:, None] - torch.arange(T)
    window = WINDOW if restricted or layout == "gdn+swa" else T
    masks = {"linear_attention": None, "full_attention": ((back >= 0) & (back < window))[None, None]}
    expected = written_by_transformers(model)(ids, attention_mask=masks, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["none", "both"])
def test_weights_begin_as_transformers_draws_them(kind):
    from experiments.qwen3_next import Qwen3Next

    torch.manual_seed(3)
    model = Qwen3Next(configuration("gdn+fa", kind), WORDS)
    torch.manual_seed(3)
    drawn = transformers.Qwen3NextModel(model.model.config).state_dict()
    own = {name: t for name, t in model.model.state_dict().items() if name in drawn}
    assert len(own) >= len(drawn) - 6 and all(torch.equal(t, drawn[name]) for name, t in own.items())
    for i in (1, 3) if kind == "both" else ():  # and the memory layers begin as they do by themselves
        memory = model.model.layers[i].memory
        assert not memory.query_norm.weight.any() and memory.query_proj.weight.abs().max() <= 32**-0.5


def test_the_paper_s_sizes():
    def parameters(layout, **kinds):
        from experiments.backbone import language_model

        config = dataclasses.replace(configuration(layout), layers=12, hidden=768, heads=12, mlp=2304, **kinds)
        config = dataclasses.replace(config, fwpkm_options={}, pkm_options={})
        with torch.device("meta"):
            model = language_model(config, 32000)
        fast = [m.MEMORY.shapes(**m.sizes) for m in model.modules() if isinstance(m, FwPKM)]
        held = sum(torch.Size(shape).numel() for shapes in fast for shape in shapes)
        return model, round((sum(p.numel() for p in model.parameters()) + held) / 1e6)

    model, millions = parameters("gdn+swa")
    attention, gdn = model.model.layers[7].self_attn, model.model.layers[0].linear_attn
    assert [hasattr(layer, "self_attn") for layer in model.model.layers] == [i in (3, 7, 11) for i in range(12)]
    assert attention.k_proj.out_features == 4 * 64 and attention.q_proj.out_features == 2 * 12 * 64  # and its gate
    assert (gdn.num_k_heads, gdn.num_v_heads, gdn.head_k_dim, gdn.head_v_dim) == (8, 8, 64, 64)
    assert gdn.conv_kernel_size == 4
    theta, size = (model.model.config.rope_parameters[x] for x in ("rope_theta", "partial_rotary_factor"))
    assert (theta, size) == (10000, 0.25) and model.model.rotary_emb.inv_freq.shape == (8,)  # 16 of 64 numbers turn
    counts = [parameters(layout)[1] for layout in ("gdn", "gdn+fa", "fa")]
    assert [*counts, millions] == [112, 113, 114, 113] and parameters("gdn", fwpkm=(2, 6, 10))[1] == 519


@pytest.mark.parametrize("heads, groups, gdn", [(1, 1, 1), (2, 2, 1), (3, 3, 2), (4, 2, 2), (5, 1, 3), (6, 3, 4)])
def test_any_number_of_heads(heads, groups, gdn):
    model, _, ids = make("gdn+fa", heads=heads, hidden=8 * heads)
    config = model.model.config
    assert (heads // config.num_key_value_heads, config.linear_num_key_heads) == (groups, gdn)
    assert model(ids, {}).isfinite().all()


@pytest.mark.parametrize("layout", ["window", "swa", ""])
def test_other_layouts_are_refused(layout):
    with pytest.raises(ValueError, match="layout"):
        make(layout)


# --------------------------------------------------------------------------------------------------------------- pieces
LENGTHS = [[20, 15], [13, 12, *[1] * 10], [*[1] * 9, 26], [2, 33], [WINDOW, WINDOW, 19]]
PIECES = pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)}-{x[0]}")


@LAYOUTS
@PIECES
@torch.no_grad()
def test_a_text_in_pieces_has_the_logits_of_one_that_is_only_read(layout, lengths):
    model, memories, ids = make(layout, "both")
    for view in (memories.frozen(), memories.frozen().streaming()):
        whole = model(ids, view)
        torch.testing.assert_close(in_pieces(model, view, ids, lengths), whole, atol=1e-4, rtol=0)
    assert whole.std() > 0.5  # so that 1e-4 is little


@LAYOUTS
@PIECES
@pytest.mark.parametrize("kind", ["both", "FwMLP"])
@torch.no_grad()
def test_a_text_in_pieces_is_written_as_one_in_one_piece(layout, lengths, kind):
    """Chunks of 8 tokens end inside of pieces, and pieces inside of chunks."""
    model, memories, ids = make(layout, kind)
    a, b, frozen = memories.clone(), memories.clone(), memories.frozen().streaming()
    whole = model(ids, a.streaming())
    torch.testing.assert_close(in_pieces(model, b.streaming(), ids, lengths), whole, atol=1e-4, rtol=0)
    for own, other in zip(a.values(), b.values()):
        assert own.pending_tokens == other.pending_tokens == T % CHUNK
    torch.testing.assert_close(bits(a), bits(b), atol=1e-4, rtol=0)
    unwritten = model(ids, frozen)
    torch.testing.assert_close(whole[:, :CHUNK], unwritten[:, :CHUNK], atol=1e-4, rtol=0)
    assert (whole - unwritten)[:, CHUNK:].abs().max() > 1e-2  # what is written is read


@LAYOUTS
@torch.no_grad()
def test_the_last_logits_alone(layout):
    model, memories, ids = make(layout, "both")
    memories = memories.frozen().streaming()
    assert torch.equal(model(ids, memories, last_only=True), model(ids, memories)[:, -1:])
    cache = model.new_cache()
    model(ids[:, :20], memories, cache=cache)
    last = model(ids[:, 20:], memories, cache=cache, last_only=True)
    torch.testing.assert_close(last, model(ids, memories)[:, -1:], atol=1e-4, rtol=0)


@ATTENTION
@PIECES
@torch.no_grad()
def test_restricted_steps_in_pieces(layout, lengths):
    model, _, ids = make(layout)
    whole = model(ids, {}, restricted=True)
    torch.testing.assert_close(in_pieces(model, {}, ids, lengths, restricted=True), whole, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------- what a token depends on
@LAYOUTS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("j", [5, 21])
@torch.no_grad()
def test_no_token_changes_a_bit_of_the_logits_before_it(layout, kind, j):
    model, memories, ids = make(layout, kind)
    for options in (dict(), dict(restricted=True)):
        logits = model(ids, memories.clone(), **options)
        other = model(changed(ids, j), memories.clone(), **options)
        assert torch.equal(logits[:, :j], other[:, :j])
        assert ((logits - other).abs().amax(-1) > 1e-4)[:, j].all()


@LAYOUTS
@torch.no_grad()
def test_what_one_row_writes_the_other_reads_in_the_next_chunk(layout):
    model, memories, ids = make(layout, "FwPKM")
    other = ids.clone()
    other[0] = changed(ids, 5)[0]
    logits, others = model(ids, memories.clone())[1], model(other, memories.clone())[1]
    assert torch.equal(logits[:CHUNK], others[:CHUNK]) and not torch.equal(logits[CHUNK:], others[CHUNK:])


@pytest.mark.parametrize("layout", ["gdn+swa", "gdn+fa", "fa"])
@pytest.mark.parametrize("lengths", [[T], *LENGTHS], ids=lambda x: f"{len(x)}-{x[0]}")
@pytest.mark.parametrize("j", [0, 17])
@torch.no_grad()
def test_attention_sees_a_window_and_no_token_more(layout, lengths, j):
    """Attention of one layer alone; without a window, all tokens after j."""
    model, _, ids = make(layout, layers=1 if layout == "fa" else 4)
    mute(model)
    other = changed(ids, j)

    def differs(**options):
        a, b = (in_pieces(model, {}, x, lengths, **options) for x in (ids, other))
        return (a != b).any(-1).any(0).tolist()

    seen = [j <= t < j + WINDOW for t in range(T)]
    assert differs(restricted=True) == seen
    if layout == "gdn+swa":
        assert differs() == seen
    else:
        assert differs() == [t >= j for t in range(T)]


@torch.no_grad()
def test_windows_in_all_calls_or_in_one():
    swa, _, ids = make("gdn+swa")
    full, _, _ = make("gdn+fa")
    full.load_state_dict(swa.state_dict())
    logits = swa(ids, {})
    assert torch.equal(logits, full(ids, {}, restricted=True)) and torch.equal(logits, swa(ids, {}, restricted=True))
    torch.testing.assert_close(logits[:, :WINDOW], full(ids, {})[:, :WINDOW], atol=1e-5, rtol=0)
    assert (logits - full(ids, {}))[:, WINDOW:].abs().amax(-1).min() > 1e-4


@LAYOUTS
@torch.no_grad()
def test_a_text_in_one_piece_has_no_mask_of_all_pairs(layout, monkeypatch):
    model, memories, _ = make(layout, "FwPKM", window=4)
    length, masks, attention = 200, [], F.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **options):
        masks.append(0 if attn_mask is None else attn_mask.numel())
        return attention(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    ids = torch.randint(WORDS, (1, length))
    for options in (dict(), dict(restricted=True), dict(cache=model.new_cache())):
        model(ids, memories.frozen(), **options)
    assert len(masks) == 3 * {"gdn": 0, "fa": 4}.get(layout, 1)
    assert all(size <= 2 * 4 * length for size in masks)


@LAYOUTS
@torch.no_grad()
def test_attention_of_transformers_is_told_the_window_and_gets_no_mask(layout, monkeypatch):
    model, _, ids = make(layout)
    told = []

    def attention(module, query, key, value, attention_mask, sliding_window=None, **_):
        told.append((attention_mask, sliding_window))
        return query.transpose(1, 2), None

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "sdpa", attention)
    model.model.set_attn_implementation("sdpa")
    in_pieces(model, {}, ids, [20, 15])
    in_pieces(model, {}, ids, [20, 15], restricted=True)
    calls = 2 * {"gdn": 0, "fa": 4}.get(layout, 1)
    assert told == [(None, WINDOW if layout == "gdn+swa" else None)] * calls + [(None, WINDOW)] * calls


# ---------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("layout", ["gdn+swa", "fa"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_comes_back_from_a_file(layout, kind, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, memories, ids = make(layout, kind)
    train(model, memories, ids)
    memories.commit()  # moves the sub-keys that the model keeps
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(9)
    other, fresh, _ = make(layout, kind)
    assert not torch.equal(other(ids, fresh.frozen()), model(ids, memories.frozen()))
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(other(ids, memories.frozen()), model(ids, memories.frozen()))
    for name in memories if kind in ("FwPKM", "both") else ():
        assert torch.equal(Memories.of(other)[name].sub_keys, memories[name].sub_keys)
