"""The scan: training, inference, decoding, and parts of it that a public operator shows by itself.

Tokens ask for slots of a given distribution: a token's query is the sub-keys of its slot, at some distance, so that its
R best slots are that slot and its neighbours. The addressing loss has a weight of 1e-6: the work is the same, and the
sub-keys stay where the distribution was drawn for, however often a case is repeated.

Contestants train and infer with the released configuration (idw, the release's write rule), which is what the dense
baseline and the released code compute.
"""

import functools
from typing import NamedTuple

import torch

import fwpkm_cuda
from bench import peers, release
from bench.cases.case import Absent, Case, Setup, Work, bag
from bench.cases.ceilings import in_graph
from bench.dense_baseline import addressing_loss, dense_scan, search
from fwpkm_cuda import reference

ADDRESSING = 1e-6  # weight of the addressing loss
DISTANCE = 0.3  # of a query from the sub-keys of its slot, squared; two sub-keys are 1/3 apart


class Shape(NamedTuple):
    B: int
    T: int
    C: int
    P: int
    K: int
    V: int
    H: int = 1
    R: int = 8
    dtype: torch.dtype = torch.float32  # of queries and targets
    distribution: str = "uniform"
    score: str = "idw"
    addressing: float = ADDRESSING

    @property
    def chunks(self):
        return -(-self.T // self.C)

    @property
    def tolerance(self):
        return 1e-4 if self.dtype == torch.float32 else 1e-2

    def small(self):
        """Of the same kind, for the reference; its addressing loss counts. P: torch.cdist, in the released code, has a
        second derivative from 26 rows on."""
        C = min(self.C, 8)
        T = C if self.chunks == 1 else 3 * C
        return self._replace(B=min(self.B, 2), T=T, C=C, P=max(self.R, 32), K=16, V=8, addressing=1.0)

    def options(self, **more):
        return (
            dict(
                topk=self.R,
                chunk_size=self.C,
                score=self.score,
                write_rule="release",
                addressing_weight=self.addressing,
            )
            | more
        )


def shape_of(s: Setup, name, B, T, C=None, **more):
    """Of a named configuration, h1k8: one head, 8 reads."""
    H, R = (int(x) for x in name[1:].split("k"))
    width = s.sizes.width
    return Shape(B, T, C or s.sizes.chunk, max(s.sizes.P, R), width, width, H, R, **more)


class Tokens(NamedTuple):
    query: torch.Tensor  # (B, T, H, K)
    target: torch.Tensor  # (B, T, V)
    loss_weights: torch.Tensor  # (B, T)


def memory_of(s: Setup, z: Shape):
    return s.memory(z.P, z.K, z.V, z.H)


def draw(s: Setup, z: Shape):
    _, sub_keys = memory_of(s, z)
    if z.distribution == "hot-8":
        slots = torch.full((z.B * z.T, 1), z.P // 2 * z.P + z.P // 3, device=s.device, dtype=torch.int32)
    else:
        slots = s.slots(z.distribution, z.P**2, z.B * z.T, 1)
    half = z.K // 2
    # Always the same way off a sub-key: two tokens that ask for one slot have the same neighbours.
    off = torch.Generator(s.device).manual_seed(1)
    points = sub_keys + torch.randn(sub_keys.shape, generator=off, device=s.device) * (DISTANCE / half) ** 0.5
    places = torch.stack((slots[:, 0] // z.P, slots[:, 0] % z.P), -1).long()  # (N, 2)
    query = torch.stack([points[:, p, places[:, p]] for p in range(2)], 2)  # (H, N, 2, K/2)
    query = query.transpose(0, 1).reshape(z.B, z.T, z.H, z.K)
    query = query + s.randn(*query.shape) * 1e-3 * z.K**-0.5
    return Tokens(query.to(z.dtype), s.randn(z.B, z.T, z.V, dtype=z.dtype), s.rand(z.B, z.T).to(z.dtype))


# ------------------------------------------------------------------------------------------------- what has to be done
def usage(indices, C):
    """Of slots (B, T, H, R): distinct ones of each chunk, added up; those of them that a later chunk reads again; and
    distinct ones of the scan."""
    seen, distinct, again = None, 0, 0
    for part in reversed(indices.split(C, 1)):
        slots = part.unique()
        distinct += len(slots)
        if seen is not None:
            again += int(torch.isin(slots, seen).sum())
        seen = slots if seen is None else torch.cat((seen, slots)).unique()
    return distinct, again, len(seen)


def work(s: Setup, z: Shape, forward=True, backward=False, write=True, log=False, commit=False):
    """Each row, token and list moved once in each chunk; the sub-keys stay in the cache."""

    def of(x):
        _, sub_keys = memory_of(s, z)
        with torch.no_grad():  # which slots: of the memory as it is at first
            indices = fwpkm_cuda.product_key_topk(x.query, sub_keys, z.R, z.score)[1]
        distinct, again, newest = usage(indices, z.C)
        row, token = 4 * z.V, x.target.element_size()
        reads, tokens = indices.numel(), z.B * z.T
        moved = flops = 0
        if forward:
            moved += tokens * (z.H * z.K + 2 * z.V) * token + 8 * reads + distinct * row * (2 if write else 1)
            moved += 2 * 4 * sub_keys.numel() + (24 * reads if log else 0)
            flops += 2 * tokens * z.H * z.P * z.K
        if backward:  # queries, targets, the gradient of out come; those of queries and targets go
            moved += tokens * (2 * z.H * z.K + 3 * z.V) * token + 24 * reads
            moved += (distinct + 2 * again) * row  # what was read; gradients of the rows that an earlier chunk wrote
        if commit:
            moved += 2 * newest * row
        products = 1 if s.device == "cpu" else 3 if z.dtype == torch.bfloat16 else 6
        facts = {"reads": reads, "distinct": distinct, "read_again": again, "rows": newest, "tokens": tokens}
        return Work(moved, flops, products, facts | {"row_bytes": distinct * row})

    return of


# ---------------------------------------------------------------------------------------------------------- inference
def in_place(s: Setup, z: Shape, **options):
    """chunk_scan_ on a memory of its own: tokens -> out"""
    values, sub_keys = s.copies(memory_of(s, z))
    options = z.options(**options)
    return lambda x: fwpkm_cuda.chunk_scan_(values, sub_keys, *x, **options).out


def replayed(s: Setup, z: Shape, memory, call):
    """call(tokens) as a CUDA graph; `memory`, which it writes, is then as before. The tokens are copied to where the
    graph reads them, which is not part of the time."""
    tokens, first = s.copies(draw(s, z)), [t.clone() for t in memory]
    graph, result = in_graph(lambda: call(tokens))
    for mine, before in zip(memory, first):
        mine.copy_(before)

    def replay(x):
        graph.replay()
        return result

    replay.load = lambda x: [mine.copy_(new) for mine, new in zip(tokens, x)]
    replay.is_graph = True
    return replay


def in_place_in_a_graph(s: Setup, z: Shape, **options):
    memory, options = s.copies(memory_of(s, z)), z.options(**options)
    return replayed(s, z, memory, lambda x: fwpkm_cuda.chunk_scan_(*memory, *x, **options).out)


def one_head(z: Shape):
    if z.H > 1:
        raise Absent("only for one head")


def dense_in_place(s: Setup, z: Shape):
    one_head(z)
    values, sub_keys = s.copies(memory_of(s, z))
    options = dict(topk=z.R, chunk_size=z.C, score=z.score, addressing_weight=z.addressing)

    def call(x):
        with torch.no_grad():
            out, new_values, new_sub_keys = dense_scan(values, sub_keys, *(t.float() for t in x), **options)
            values.copy_(new_values)
            sub_keys.copy_(new_sub_keys)
        return out.to(z.dtype)

    return call


def release_module(s: Setup, z: Shape, train):
    if not s.release_dir:
        raise Absent("no --release-dir")
    return release.make(s.release_dir, *memory_of(s, z), z.R, z.score).train(train)


def release_in_place(s: Setup, z: Shape, at_once=8):
    """The released code in eval mode, a few chunks a call: it keeps a copy of the whole memory for each of them."""
    module = release_module(s, z, train=False)
    module.addr_loss_weight = z.addressing

    def call(x):
        parts = zip(*(t.split(at_once * z.C, 1) for t in x))
        with torch.no_grad():
            return torch.cat([release.run(module, *part, z.C) for part in parts], 1)

    return call


def scan_reference(s: Setup, z: Shape, **options):
    """out of the specification, from the first memory"""

    def of(x):
        with torch.no_grad():
            x = [t.to(memory_of(s, z)[0].dtype) for t in x]
            return reference.chunk_scan(*memory_of(s, z), *x, **z.options(**options)).out

    return of


def inference(s: Setup, z: Shape, peer=True, small=False):
    contestants = {"ours": lambda: in_place(s, z), "ours, graph": lambda: in_place_in_a_graph(s, z)}
    if peer:
        contestants["dense baseline"] = lambda: dense_in_place(s, z)
        contestants["release"] = lambda: release_in_place(s, z)
    return Case(
        inputs=lambda: draw(s, z),
        contestants=contestants,
        expected=scan_reference(s, z),
        work=work(s, z),
        checked=None if small else inference(s, z.small(), peer, small=True),
        tolerance=z.tolerance,
        per=z.chunks,
        most_sets=4,
    )


def layer_infer(s: Setup):
    z = s.sizes
    for name in z.configurations:
        shape = shape_of(s, name, 1, z.length)
        yield f"{name} B=1 T={z.length} C={z.chunk}", lambda shape=shape: inference(s, shape)
    hot = shape_of(s, "h1k8", 1, z.length, distribution="hot-8")
    yield f"h1k8 B=1 T={z.length} C={z.chunk}, hot-8", lambda: inference(s, hot, peer=False)
    for C in (z.chunk, z.long):
        shape = shape_of(s, "h1k8", 1, z.long, C)
        yield f"h1k8 B=1 T={z.long} C={C}", lambda shape=shape: inference(s, shape)
    for P in z.slots:
        shape = shape_of(s, "h1k8", 1, z.length)._replace(P=P)
        yield f"h1k8 B=1 T={z.length} C={z.chunk}, P={P}", lambda shape=shape: inference(s, shape, peer=False)


# ------------------------------------------------------------------------------------------------------------ decoding
def decode(s: Setup):
    """One token of a stream: read with its chunk still open, or read and written as a chunk of its own. Sixteen tokens
    follow one another: the time of one is the host's or the GPU's, whichever is slower."""
    for name in s.sizes.configurations:
        shape = shape_of(s, name, 1, 1)
        yield f"{name}, read", lambda shape=shape: decoding(s, shape, dict(flush=False))
        yield f"{name}, read and written", lambda shape=shape: decoding(s, shape, dict(chunk_size=1))


def decoding(s: Setup, z: Shape, options, small=False):
    return Case(
        inputs=lambda: draw(s, z),
        contestants={
            "ours": lambda: in_place(s, z, **options),
            "ours, graph": lambda: in_place_in_a_graph(s, z, **options),
            "eager": lambda: eager_read(s, z),
        },
        expected=scan_reference(s, z, **options),
        work=work(s, z, write="chunk_size" in options),
        cold=False,
        calls=16,
        checked=None if small else decoding(s, z.small(), options, small=True),
        tolerance=z.tolerance,
        unlike={} if "flush" in options else {"eager": "it only reads"},
    )


def eager_read(s: Setup, z: Shape):
    """Searched and read in plain PyTorch."""
    one_head(z)
    values, sub_keys = memory_of(s, z)

    def call(x):
        _, scores, slots = search(x.query.reshape(-1, z.K).float(), sub_keys[0], z.R, z.score)
        out = bag(values, slots, scores.softmax(-1))
        return out.view_as(x.target)

    return call


# ------------------------------------------------------------------------------------------------------------ training
class Training:
    """A step: forward, the gradients of query, target and loss weights for a given gradient of out, commit.

    scan(query, target, loss_weights) -> out, and a function that commits or None"""

    after_forward = None  # called when there is what the backward pass needs (timing.memory_of)

    def __init__(self, scan, answers=4):
        self.scan, self.answers = scan, answers

    def __call__(self, x):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in x]
            out, commit = self.scan(*leaves)
        if self.after_forward:
            self.after_forward()
        gradients = torch.autograd.grad(  # nothing is written to be read later: targets do not matter
            out, leaves, x.target.to(out.dtype), allow_unused=True, materialize_grads=True
        )
        if commit:
            commit()
        return (out.detach(), *gradients)[: self.answers]


def trained(s: Setup, z: Shape, commit=True, memory=None):
    values, sub_keys = memory or s.copies(memory_of(s, z))

    def scan(*tokens):
        result = fwpkm_cuda.chunk_scan(values, sub_keys, *tokens, **z.options())
        detached = fwpkm_cuda.Scan(*(t.detach() for t in result))
        return result.out, (lambda: fwpkm_cuda.commit_(values, sub_keys, detached)) if commit else None

    return Training(scan)


def trained_in_a_graph(s: Setup, z: Shape):
    memory = s.copies(memory_of(s, z))
    return replayed(s, z, memory, trained(s, z, memory=memory))


def forward_only(s: Setup, z: Shape, **options):
    """chunk_scan as a training step calls it, and nothing after it."""
    values, sub_keys = memory_of(s, z)

    def call(x):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in x]
            return fwpkm_cuda.chunk_scan(values, sub_keys, *leaves, **z.options(**options)).out

    return call


def dense_trained(s: Setup, z: Shape):
    one_head(z)
    values, sub_keys = s.copies(memory_of(s, z))
    options = dict(topk=z.R, chunk_size=z.C, score=z.score, addressing_weight=z.addressing)

    def scan(query, target, loss_weights):
        tokens = (t.float() for t in (query, target, loss_weights))
        out, new_values, new_sub_keys = dense_scan(values, sub_keys, *tokens, **options)
        new = new_values.detach(), new_sub_keys.detach()
        return out, lambda: (values.copy_(new[0]), sub_keys.copy_(new[1]))

    return Training(scan)


def release_trained(s: Setup, z: Shape):
    """Of its answers only out is compared: it overwrites float32 parameters before the backward pass, which then takes
    the new values for those that were read."""
    module = release_module(s, z, train=True)
    module.addr_loss_weight = z.addressing
    return Training(lambda *tokens: (release.run(module, *tokens, z.C), None), answers=1)


def package_trained(s: Setup, z: Shape):
    """Another package's layer: its tokens go in, and gradients for them come back."""
    module = peers.fast_weight_product_key_memory(s, z.V, z.P, z.H, z.R, z.C)

    def scan(query, target, loss_weights):
        return module(target.float()) + 0 * (query.sum() + loss_weights.sum()), None

    return Training(scan)


def training_reference(s: Setup, z: Shape):
    def scan(*tokens):
        values, sub_keys = memory_of(s, z)
        tokens = [t.to(values.dtype) for t in tokens]
        return reference.chunk_scan(values, sub_keys, *tokens, **z.options()).out, None

    return Training(scan)


def training(s: Setup, z: Shape, peer=True, small=False):
    contestants = {
        "ours": lambda: trained(s, z),
        "ours, graph": lambda: trained_in_a_graph(s, z),
        "ours without commit": lambda: trained(s, z, commit=False),
        "ours, forward": lambda: forward_only(s, z),
    }
    if peer:
        contestants["dense baseline"] = lambda: dense_trained(s, z)
        contestants["release"] = lambda: release_trained(s, z)
        contestants["fast-weight-product-key-memory"] = lambda: package_trained(s, z)
    return Case(
        inputs=lambda: draw(s, z),
        contestants=contestants,
        expected=training_reference(s, z),
        work=work(s, z, backward=True, log=True, commit=True),
        unlike={
            "ours, forward": "a part of the step",
            "fast-weight-product-key-memory": "another layer: its own projections, one memory per sequence",
        },
        checked=None if small else training(s, z.small(), peer, small=True),
        tolerance=z.tolerance,
        per=z.chunks,
        most_sets=2,
    )


def layer_train(s: Setup):
    z = s.sizes
    for name in z.configurations:
        for distribution in z.distributions if name == "h1k8" else ("uniform",):
            shape = shape_of(s, name, z.batch, z.length, distribution=distribution)
            title = f"{name} B={z.batch} T={z.length} C={z.chunk}, {distribution}"
            yield title, lambda shape=shape, peer=distribution == "uniform": training(s, shape, peer)


def rival(s: Setup):
    """The shape that sparse-delta-memory publishes: bfloat16 tokens, many reads, small chunks."""
    P, width, B, T, C, R = s.sizes.rival
    shape = Shape(B, T, C, P, width, width, 1, R, torch.bfloat16)
    yield f"h1k{R} B={B} T={T} C={C} P={P} V={width}, bfloat16", lambda: beside_the_rival(s, shape)


def beside_the_rival(s: Setup, z: Shape):
    """Their layer takes the targets for its tokens, and gives the gradients of these alone. It runs at no smaller size,
    for whose shape it would have to be compiled."""

    def theirs():
        layer = peers.sparse_delta_memory(s, z.V, z.P, z.R, z.C, z.dtype)
        return Training(lambda query, target, loss_weights: (layer(target), None))

    case = training(s, z, peer=False)
    case.contestants["sparse-delta-memory"] = theirs
    case.unlike["sparse-delta-memory"] = "another update rule, its own projections, the slots of its own keys"
    return case


def memory(s: Setup):
    """What a training step keeps and needs, against T."""
    for T in s.sizes.lengths:
        shape = shape_of(s, "h1k8", 1, T)
        yield f"h1k8 B=1 T={T} C={s.sizes.chunk}", lambda shape=shape: training(s, shape)


# ----------------------------------------------------------------------------------------------------- parts of a scan
def update(s: Setup):
    """One chunk, written into the log (chunk_scan) or in place (chunk_scan_). `read only` is the same call with its
    chunk left open: the difference is the write of rows and sub-keys."""
    z = s.sizes
    for distribution in z.distributions:
        shape = shape_of(s, "h1k8", z.batch, z.chunk, distribution=distribution)
        yield f"log, {distribution}", lambda shape=shape: logged_chunk(s, shape)
        yield f"in place, {distribution}", lambda shape=shape: placed_chunk(s, shape)


def one_chunk(s: Setup, z: Shape, contestants, unlike, checked):
    return Case(
        inputs=lambda: draw(s, z),
        contestants=contestants,
        expected=scan_reference(s, z),
        work=work(s, z),
        unlike=unlike,
        checked=checked,
        tolerance=z.tolerance,
        most_sets=4,
    )


def logged_chunk(s: Setup, z: Shape, small=False):
    return one_chunk(
        s,
        z,
        {
            "ours": lambda: forward_only(s, z),
            "ours, read only": lambda: forward_only(s, z._replace(C=z.T + 1), flush=False),
        },
        {},
        None if small else logged_chunk(s, z.small(), small=True),
    )


def placed_chunk(s: Setup, z: Shape, small=False):
    unlike = dict.fromkeys(
        ("embedding_bag and index_add_", "fbgemm"), "reads and adds to the rows, with no search or step sizes"
    )
    return one_chunk(
        s,
        z,
        {
            "ours": lambda: in_place(s, z),
            "ours, read only": lambda: in_place(s, z._replace(C=z.T + 1), flush=False),
            "embedding_bag and index_add_": lambda: bag_and_add(s, z),
            "fbgemm": lambda: fbgemm_step(s, z),
        },
        unlike,
        None if small else placed_chunk(s, z.small(), small=True),
    )


def searched(s: Setup, z: Shape):
    """tokens -> slots (N, R), weights (N, R); of the first memory, found once for each set of inputs"""
    _, sub_keys = memory_of(s, z)

    @functools.cache
    def of(query):
        scores, slots = fwpkm_cuda.product_key_topk(query, sub_keys, z.R, z.score)
        return slots.view(-1, z.H * z.R), scores.flatten(-2).softmax(-1).view(-1, z.H * z.R)

    return lambda x: of(x.query)


def bag_and_add(s: Setup, z: Shape):
    """The traffic of a chunk with nothing else to it."""
    values, find = memory_of(s, z)[0].clone(), searched(s, z)

    def call(x):
        slots, weights = find(x)
        out = bag(values, slots, weights)
        rows = (weights.unsqueeze(-1) * x.target.flatten(0, 1).unsqueeze(1)).flatten(0, 1)
        values.index_add_(0, slots.flatten(), rows, alpha=-1e-6)
        return out

    return call


def fbgemm_step(s: Setup, z: Shape):
    read, find = peers.fbgemm_table(s, memory_of(s, z)[0], lr=1e-6), searched(s, z)

    def call(x):
        with torch.enable_grad():
            out = read(*find(x))
        out.backward(x.target.flatten(0, 1))
        return out.detach()

    return call


def addressing(s: Setup):
    """The step of the sub-keys: the difference between one chunk in place with rows of four numbers and the same
    without the addressing loss."""
    for tokens in sorted({s.sizes.chunk, s.sizes.batch * s.sizes.chunk}):
        shape = shape_of(s, "h1k8", 1, tokens, tokens)._replace(V=4)
        yield f"M={tokens}", lambda shape=shape: sub_key_step(s, shape)


def sub_key_step(s: Setup, z: Shape, small=False):
    def step(addressing):
        values, sub_keys = s.copies(memory_of(s, z))
        options = z.options(addressing_weight=addressing)

        def call(x):
            fwpkm_cuda.chunk_scan_(values, sub_keys, *x, **options)
            return sub_keys

        return call

    def autograd():
        one_head(z)
        _, first = memory_of(s, z)
        keys = first.clone()

        def call(x):
            with torch.enable_grad():
                k = keys.detach().requires_grad_()
                sub_scores, *_ = search(x.query.reshape(-1, z.K), k[0], z.R, z.score)
                (gradient,) = torch.autograd.grad(z.addressing * addressing_loss(sub_scores, z.R), k)
            return keys.sub_(gradient)

        return call

    def expected(x):
        return reference.chunk_scan(*memory_of(s, z), *x, **z.options()).sub_keys.detach()

    return Case(
        inputs=lambda: draw(s, z),
        contestants={
            "ours": lambda: step(z.addressing),
            "ours without addressing": lambda: step(0.0),
            "autograd, search and step": autograd,
        },
        expected=expected,
        unlike={"ours without addressing": "a part of it"},
        checked=None if small else sub_key_step(s, z.small(), small=True),
        tolerance=1e-4,
    )


def backward(s: Setup):
    """The backward pass by itself: the gradients of a scan that stands."""
    z = s.sizes
    for name in z.configurations:
        shape = shape_of(s, name, z.batch, min(4 * z.chunk, z.length))
        yield f"{name} B={z.batch} T={shape.T} C={z.chunk}", lambda shape=shape: backward_only(s, shape)


def backward_only(s: Setup, z: Shape, small=False):
    def of(step):
        scan, standing = step.scan, {}

        def call(x):
            if id(x) not in standing:
                with torch.enable_grad():
                    leaves = [t.detach().requires_grad_() for t in x]
                    standing[id(x)] = scan(*leaves)[0], leaves, x
            out, leaves, _ = standing[id(x)]
            return torch.autograd.grad(out, leaves, x.target.to(out.dtype), retain_graph=True)

        return call

    return Case(
        inputs=lambda: draw(s, z),
        contestants={
            "ours": lambda: of(trained(s, z, commit=False)),
            "dense baseline": lambda: of(dense_trained(s, z)),
        },
        expected=lambda x: training_reference(s, z)(x)[1:],
        work=work(s, z, forward=False, backward=True),
        checked=None if small else backward_only(s, z.small(), small=True),
        tolerance=z.tolerance,
        per=z.chunks,
        most_sets=2,
    )
