"""Random operations on memories, against a model made of dense copies that the reference drives."""

import os
import tempfile

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from inputs import memory as random_memory

from fwpkm_cuda import Memory, reference

B, H, P, K, V = 2, 2, 4, 6, 3
EXAMPLES = max(40, int(os.environ.get("FWPKM_HYPOTHESIS_EXAMPLES", "150")) // 3)
STEPS = 40  # operations of an example, at most
MOST_TOKENS = 9
OPTIONS = st.fixed_dictionaries(
    dict(
        topk=st.integers(1, 3),
        chunk_size=st.integers(3, 5),
        lookahead=st.integers(0, 3),
        score=st.sampled_from(["dot", "idw"]),
        boundary=st.sampled_from(["drop", "carry"]),
        lr=st.sampled_from([0.3, 1.0]),
        weight_decay=st.sampled_from([0.0, 0.05]),
        grad_clip=st.sampled_from([None, 0.5]),
        write_rule=st.sampled_from(["paper", "release"]),
    )
)


class Model:
    """What a memory must be: a reference stream, its options, and the result of a scan that waits."""

    def __init__(self, values, sub_keys):
        self.stream, self.options, self.scanned = reference.Stream(values, sub_keys), None, None

    def settle(self):
        if self.scanned is not None:
            self.stream = reference.Stream(self.scanned.values.detach(), self.scanned.sub_keys.detach())
            self.scanned = None

    def copy(self):
        twin = Model(self.stream.values, self.stream.sub_keys)
        twin.stream, twin.options, twin.scanned = self.stream, self.options, self.scanned
        return twin

    @property
    def queued(self):
        return 0 if self.stream.query is None else self.stream.query.shape[1]


def close(a, b):
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-8, atol=1e-8)


class Memories(RuleBasedStateMachine):
    memories = Bundle("memories")

    def __init__(self):
        super().__init__()
        self.operations = 0

    @initialize(target=memories, seed=st.integers(0, 1000))
    def make(self, seed):
        torch.manual_seed(seed)
        values, sub_keys = random_memory(H, P, K, V)
        return Memory(values.clone() / 4, sub_keys.clone()), Model(values / 4, sub_keys)

    def tokens(self, n, seed):
        draw = torch.Generator().manual_seed(seed)
        new = lambda *shape: torch.randn(B, n, *shape, generator=draw, dtype=torch.float64)
        return new(H, K), new(V), new().sigmoid(), new() > -0.5

    def check(self, memory, model):
        Memories.count += 1
        state = model.stream
        close(memory.values, state.values)
        close(memory.sub_keys, state.sub_keys)
        assert (memory.pending is None) == (model.scanned is None)
        assert memory.pending_tokens == model.queued - state.carried

    @rule(pair=memories, n=st.integers(0, MOST_TOKENS), seed=st.integers(0, 10**6), options=OPTIONS)
    def stream(self, pair, n, seed, options):
        memory, model = pair
        model.settle()
        if model.queued:
            options = model.options
        tokens = self.tokens(n, seed)
        with torch.no_grad():
            reading = memory.stream(*tokens, **options)
            expected, model.stream = reference.stream(model.stream, *tokens, **options)
        model.options = options
        for name in ("out", "weights", "losses", "addressing_loss"):
            close(getattr(reading, name), getattr(expected, name))
        assert torch.equal(reading.indices.long(), expected.indices)
        self.check(memory, model)

    @rule(pair=memories)
    def flush(self, pair):
        memory, model = pair
        model.settle()
        reading = memory.flush()
        assert (reading is not None) == (model.queued > model.stream.carried)
        if reading is not None:
            with torch.no_grad():
                expected, model.stream = reference.flush(model.stream, **model.options)
            close(reading.losses, expected.losses)
        model.stream = reference.Stream(model.stream.values, model.stream.sub_keys)
        self.check(memory, model)

    @rule(pair=memories, n=st.integers(0, MOST_TOKENS), seed=st.integers(0, 10**6), options=OPTIONS)
    def scan(self, pair, n, seed, options):
        memory, model = pair
        model.settle()
        query, *others = self.tokens(n, seed)
        leaf = query.requires_grad_()
        if model.queued:
            try:
                memory.scan(query, *others, **options)
            except RuntimeError as error:
                assert "flush()" in str(error)
            else:
                raise AssertionError("a scan while tokens of a stream wait")
            return
        scan = memory.scan(query, *others, **options)
        model.scanned = reference.chunk_scan(model.stream.values, model.stream.sub_keys, query, *others, **options)
        close(scan.out, model.scanned.out)
        if n:
            ours, theirs = (torch.autograd.grad(s.out.sin().sum(), leaf)[0] for s in (scan, model.scanned))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        self.check(memory, model)

    @rule(pair=memories, keep=st.booleans())
    def end_scan(self, pair, keep):
        memory, model = pair
        if keep:
            memory.commit()
            model.settle()
        else:
            memory.rollback()
            model.scanned = None
        self.check(memory, model)

    @rule(pair=memories, n=st.integers(0, MOST_TOKENS), seed=st.integers(0, 10**6), options=OPTIONS)
    def read_frozen(self, pair, n, seed, options):
        """As a scan that never comes to a write; nothing of the memory moves."""
        memory, model = pair
        tokens = self.tokens(n, seed)
        state = model.stream
        without_writes = options | dict(chunk_size=100, flush=False)
        expected = reference.chunk_scan(state.values, state.sub_keys, *tokens, **without_writes)
        close(memory.frozen().scan(*tokens, **options).out, expected.out)
        with torch.no_grad():
            close(memory.frozen().stream(*tokens, **options).out, expected.out)
        self.check(memory, model)

    @rule(target=memories, pair=memories)
    def clone(self, pair):
        memory, model = pair
        model.settle()
        pair = memory.clone(), model.copy()
        self.check(*pair)
        return pair

    @rule(pair=memories, other=memories)
    def copy(self, pair, other):
        (memory, model), (source, source_model) = pair, other
        address = memory.values.data_ptr()
        if memory is not source:
            source_model.settle()
            twin = source_model.copy()
            model.stream, model.options, model.scanned = twin.stream, twin.options, None
        memory.copy_(source)
        assert memory.values.data_ptr() == address
        self.check(memory, model)
        self.check(source, source_model)

    @rule(target=memories, pair=memories)
    def save_and_load(self, pair):
        memory, model = pair
        model.settle()
        with tempfile.TemporaryDirectory() as folder:
            memory.save(f"{folder}/memory")
            loaded = Memory.load(f"{folder}/memory")
        self.check(memory, model)
        pair = loaded, model.copy()
        self.check(*pair)
        return pair


def test_random_operations_match_the_model():
    Memories.count = 0
    run_state_machine_as_test(
        Memories,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert Memories.count >= 1000, f"{Memories.count} operations were checked"
