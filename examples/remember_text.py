"""Reads a text several times with an untrained memory, and asks it for the next token at every position.

    python examples/remember_text.py                          # source text of the Python standard library
    python examples/remember_text.py book.txt --ask "a passage of the book, of ten words or so"
    python examples/remember_text.py --whole-text             # one write per pass, as in the paper's retrieval test
    python examples/remember_text.py --help                   # all settings

Nothing is trained: embeddings and sub-keys are random numbers. All that the program learns of the text is written into
`values` by `fwpkm_cuda.chunk_scan_` while it reads. At token x

    query     product over the last n tokens of random signs; the signs of a token depend on its distance from x
    target    a random vector for each word of the vocabulary, all of one length; what is read at token x should be the
              target of token x+1 (lookahead 1)
    recalled  if of all words' vectors the one nearest to what was read is that of token x+1

One other token turns half of the signs of such a product, so that different contexts are nearly orthogonal in both
halves of the query and read different slots, while the same context reads the same slots again. (With a sum in place of
the product, contexts that share tokens share slots, and less is recalled.)

A chunk is read with the memory as it was before the chunk. Pass 1 recalls only what repeats within the text. From pass
2 on all of it has been written, and recall is limited by slots that several contexts share, and by contexts that are
followed by different tokens at different places.
"""

import argparse
import json
import re
import sys
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import fwpkm_cuda

UNKNOWN = 0  # id of all tokens outside the vocabulary; they never count as recalled
CHUNKS_PER_CALL = 16


# -------------------------------------------------------------------------------------------------------------- text
def split(data, as_bytes=False):
    """bytes -> tokens: words and punctuation, each with the space before it, and other white space; or single bytes."""
    if as_bytes:
        return list(data.decode("latin-1"))
    return re.findall(r" ?\w+| ?[^\w\s]+|\s+", data.decode("utf-8", "replace"))


def encode(tokens, vocabulary):
    ids = {word: i for i, word in enumerate(vocabulary)}
    return torch.tensor([ids.get(token, UNKNOWN) for token in tokens], dtype=torch.int64)


def read_text(files, max_tokens, max_vocabulary, as_bytes):
    """(files read, the first `max_tokens` tokens of them in the order given, their most frequent words)"""
    sources, tokens = [], []
    for file in files:
        if len(tokens) < max_tokens:
            try:
                tokens += split(Path(file).read_bytes(), as_bytes)
            except OSError as error:
                sys.exit(str(error))
            sources.append(str(file))
    tokens = tokens[:max_tokens]
    return sources, tokens, ["<unknown>", *(word for word, _ in Counter(tokens).most_common(max_vocabulary - 1))]


def standard_library():
    """The public top-level modules of this Python's standard library, by name."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))
    return files or sys.exit("the source of this Python's standard library is not installed: name a text file")


def best_guess(ids, n):
    """(recall of always guessing the most frequent follower of the last n tokens, number of different contexts).

    Counted over the text itself: no fixed table of answers to the last n tokens recalls more of it."""
    words = int(ids.max()) + 1
    context = torch.zeros_like(ids[:-1])
    for back in range(n):
        token = torch.full_like(context, words)  # before the text begins
        token[back:] = ids[: max(len(context) - back, 0)]
        context = (context * (words + 1) + token).unique(return_inverse=True)[1]
    pairs, count = (context * words + ids[1:]).unique(return_counts=True)
    count[pairs % words == UNKNOWN] = 0
    best = count.new_zeros(int(context.max()) + 1).scatter_reduce_(0, pairs // words, count, "amax")
    return float(best.sum()) / len(context), len(best)


# ------------------------------------------------------------------------------------------------------------ memory
@dataclass
class Memory:
    """Random numbers that stay, and the fast weights that `chunk_scan_` writes."""

    signs: torch.Tensor  # (words, K)      stay: +1 or -1
    targets: torch.Tensor  # (words, V)      stay: all of length sqrt(V)
    sub_keys: torch.Tensor  # (1, 2, P, K/2)  written only if the addressing weight is not 0
    values: torch.Tensor  # (P*P, V)        written
    context: int
    sharpness: float
    options: dict  # of chunk_scan_

    @classmethod
    def random(cls, words, args, device):
        draw = torch.Generator().manual_seed(args.seed)
        signs = torch.randint(0, 2, (words, args.key_dim), generator=draw) * 2.0 - 1.0
        targets = torch.randn(words, args.value_dim, generator=draw)
        targets *= args.value_dim**0.5 / targets.norm(dim=1, keepdim=True)
        sub_keys = (torch.rand(1, 2, args.sub_keys, args.key_dim // 2, generator=draw) * 2 - 1) / args.key_dim**0.5
        values = torch.randn(args.sub_keys**2, args.value_dim, generator=draw) / args.value_dim**0.5
        tensors = (x.to(device) for x in (signs, targets, sub_keys, values))
        options = {name: getattr(args, name) for name in ("topk", "score", "write_rule", "lr", "addressing_weight")}
        return cls(*tensors, args.context, args.sharpness, options | {"lookahead": 1, "boundary": "carry"})

    def query(self, ids):
        """(T,) -> (T, K): product of the signs of the last n tokens, rolled by their distance."""
        query = torch.full((len(ids), self.signs.shape[1]), self.sharpness, device=ids.device)
        for back in range(min(self.context, len(ids))):
            query[back:] *= self.signs[ids[: len(ids) - back]].roll(back, -1)
        return query

    def scan(self, ids, start, stop, **options):
        """`chunk_scan_` of the tokens start..stop; queries look back at the tokens before them."""
        back = min(start, self.context - 1)
        query, target = self.query(ids[start - back : stop])[back:], self.targets[ids[start:stop]]
        return fwpkm_cuda.chunk_scan_(
            self.values, self.sub_keys, query[None, :, None], target[None], **self.options, **options
        )

    def nearest(self, out):
        """(T, V) -> (T,): the words with the nearest targets. These are of one length: the largest dot product."""
        return torch.cat([(block @ self.targets.T).argmax(-1) for block in out.split(1024)])


@dataclass
class Log:
    """What the T tokens of one pass answered and read, and therefore where they wrote. R slots are read per token."""

    answers: torch.Tensor  # (T,) words
    indices: torch.Tensor  # (T, R) slots, int32
    weights: torch.Tensor  # (T, R)
    memory_loss: float
    seconds: float
    operator_seconds: float


def stream(memory, ids, chunk_size, progress):
    """One pass over the text in place, call by call.

    All calls but the last have whole chunks, so nothing is pending between calls, and the one partial chunk is written
    at the end. "carry": the last token of a call is answered by the first of the next, where it is given once more."""
    T, pairs, loss, operator_seconds, began = len(ids), 0, 0.0, 0.0, clock(ids.device)
    parts = []
    for start in range(0, T, CHUNKS_PER_CALL * chunk_size):
        stop, carried = min(start + CHUNKS_PER_CALL * chunk_size, T), 1 if start else 0
        call_began = clock(ids.device)
        reading = memory.scan(ids, start - carried, stop, carried=carried, chunk_size=chunk_size)
        operator_seconds += clock(ids.device) - call_began
        parts.append((memory.nearest(reading.out[0]), reading.indices[0].flatten(1), reading.weights[0].flatten(1)))
        pairs, loss = pairs + reading.losses.numel(), loss + float(reading.losses.sum())
        progress(stop / T)
    tensors = (torch.cat(x).cpu() for x in zip(*parts))
    return Log(*tensors, loss / pairs, clock(ids.device) - began, operator_seconds)


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summary(log, ids, values):
    """The figures of one pass, as plain numbers."""
    recalled = ((log.answers[:-1] == ids[1:]) & (ids[1:] != UNKNOWN)).float()
    reads, counts = log.indices.numel(), log.indices.flatten().bincount(minlength=len(values))
    return {
        "recall": float(recalled.mean()),
        "recall_by_position": [float(x.mean()) for x in recalled.tensor_split(min(100, len(recalled)))],
        "memory_loss": log.memory_loss,
        "largest_value": float(values.abs().max()),
        "slots_used": int((counts > 0).sum()),
        "collisions": float(counts[counts > 1].sum()) / reads,
        "collisions_if_random": 1 - (1 - 1 / len(values)) ** (reads - 1),
        "tokens_per_second_memory": len(ids) / log.operator_seconds,
        "tokens_per_second": len(ids) / log.seconds,
    }


# --------------------------------------------------------------------------------------------------------------- ask
def ask(memory, ids, tokens, vocabulary, log, passage):
    """Reads a passage (tokens) without writing: what the memory answers, and which positions of the last pass wrote it.

    A slot holds what all tokens that read it wrote there. The share of a position in an answer is its part of the sum
    over slots of (weight of the slot in this read) * (weight of the slot when it was written)."""
    passage_ids, n = encode(passage, vocabulary), memory.context
    if len(passage) <= n:
        sys.exit(f"--ask: {n} tokens make a query, and there are only {len(passage)}: give a longer passage")
    device, never_full = memory.values.device, len(passage) + 1
    reading = memory.scan(passage_ids.to(device), 0, len(passage), chunk_size=never_full, flush=False)
    answers = memory.nearest(reading.out[0]).tolist()
    slots, weights = (x[0].flatten(1).cpu() for x in (reading.indices, reading.weights))
    predicted = []
    for x in range(n - 1, len(passage) - 1):  # the tokens before only complete the first context
        written = sum(w * (log.weights * (log.indices == s)).sum(1) for s, w in zip(slots[x], weights[x]))[:-1]
        share = written / written.sum().clamp(min=1e-30)
        writers = [
            {"position": i, "share": float(share[i]), "context": "".join(tokens[max(i - n + 1, 0) : i + 1]),
             "next": tokens[i + 1]}
            for i in share.topk(min(3, len(share))).indices.tolist() if share[i] > 0
        ]  # fmt: skip
        answer, recalled = vocabulary[answers[x]], answers[x] == int(passage_ids[x + 1]) != UNKNOWN
        predicted.append({"answer": answer, "text": passage[x + 1], "recalled": recalled, "written_by": writers})
    starts = torch.ones(max(len(ids) - len(passage) + 1, 0), dtype=torch.bool)
    for k, word in enumerate(passage_ids):
        starts &= ids[k : k + len(starts)] == word
    return {"passage": "".join(passage), "found_at": starts.nonzero().flatten().tolist(), "tokens": predicted}


# ------------------------------------------------------------------------------------------------------------ output
def progress_bar(number, visible):
    """A function that draws how much of a pass is done, on stderr."""

    def draw(share):
        if visible:
            bar = f"pass {number} [{'#' * int(40 * share):<40}] {share:4.0%}"
            print(f"\r{bar}" if share < 1 else f"\r{' ' * len(bar)}\r", end="", file=sys.stderr, flush=True)

    return draw


def print_head(sources, text, guesses, memory, chunk_size):
    T, n, (slots, V) = text["tokens"], memory.context, memory.values.shape
    print(f"text     {T:,} tokens of {sources[0]}{' ...' * (len(sources) > 1)}")
    print(f"         {text['vocabulary'] - 1:,} words, {text['unknown']:.1%} of the tokens unknown; "
          f"{text['contexts']:,} different contexts of {n} tokens")  # fmt: skip
    print(f"memory   {slots:,} slots of {V} float32 ({slots * V / 2**18:,.0f} MiB, {memory.values.device}), "
          f"{memory.options['topk']} read per token")  # fmt: skip
    first = "what repeats within the text" if chunk_size < T else "nothing: it is written at the end of the pass"
    print(f"chunk    {chunk_size:,} tokens, {-(-T // chunk_size):,} writes per pass; pass 1 recalls {first}")
    print(f"guesses  always the most frequent token recalls {guesses['token']:.1%}; after the previous token "
          f"{guesses['previous']:.1%};\n         after the last {n} tokens {guesses['context']:.1%}: "
          "no fixed table of answers to these queries recalls more")  # fmt: skip


def print_row(number, p):
    if number == 1:
        print("\npass  recall  memory loss  largest value  slots used  collisions (random)  tokens/s: memory   overall")
    print(
        f"{number:>4} {p['recall']:>7.1%} {p['memory_loss']:>12.3g} {p['largest_value']:>14.4g} {p['slots_used']:>11,}"
        f"{p['collisions']:>12.1%} ({p['collisions_if_random']:.1%})"
        f"{p['tokens_per_second_memory']:>18,.0f} {p['tokens_per_second']:>9,.0f}",
        flush=True,
    )


def print_answers(asked, context):
    """One line per predicted token, with the position that has the largest share in the answer."""
    places = ", ".join(f"token {i:,}" for i in asked["found_at"][:3]) or "nowhere"
    print(f"\nAsked for a passage (in the text at: {places}), given {context} tokens at a time, without writing.")
    print(f"  {'memory says':<18}   {'text says':<18} share of token, which wrote: context -> next")
    for token in asked["tokens"]:
        line = f"  {shown(token['answer'], 18)} {'=' if token['recalled'] else '!'} {shown(token['text'], 18)}"
        for by in token["written_by"][:1]:
            line += f" {by['share']:>4.0%} {by['position']:>9,}: {shown(by['context'], 32)} -> {shown(by['next'], 18)}"
        print(line.rstrip())
    print(f"  recalled: {sum(t['recalled'] for t in asked['tokens'])} of {len(asked['tokens'])}\n")


def shown(text, width):
    """The end of a text in brackets, in `width` characters."""
    inner = repr(text)[1:-1]
    inner = inner if len(inner) <= width - 2 else ".." + inner[4 - width :]
    return f"{f'[{inner}]':<{width}}"


def plot(passes, guesses, tokens, context, file):
    """Recall against position, one line per pass."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        return print("No plot: matplotlib is not installed (pip install matplotlib).")
    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, p in enumerate(passes, 1):
        curve = p["recall_by_position"]
        at = [(k + 0.5) * tokens / len(curve) for k in range(len(curve))]
        colour = colormaps["viridis_r"](0.1 + 0.9 * number / len(passes))
        axes.plot(at, curve, color=colour, label=f"pass {number}: {p['recall']:.1%}")
    for key, name, style in (("context", f"last {context} tokens", "--"), ("previous", "previous token", ":")):
        label = f"best guess from the {name}: {guesses[key]:.1%}"
        axes.axhline(guesses[key], color="0.35", linewidth=1, linestyle=style, label=label)
    axes.set(xlabel="position in the text (tokens)", ylabel="recall of the next token", xlim=(0, tokens), ylim=(0, 1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    figure.savefig(file, dpi=110)
    print(f"Recall against position: {file}")


# -------------------------------------------------------------------------------------------------------------- main
def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])

    def add(*names, help, **settings):
        default = settings.get("default")
        p.add_argument(*names, help=help if default is None else f"{help} (default: {default})", **settings)

    add("files", nargs="*", metavar="FILE", help="text files; without: the source of the Python standard library")
    add("--max-tokens", type=positive, default=100_000, help="the text is cut here")
    add("--vocabulary", type=int, default=16384, help="most frequent words that are told apart")
    add("--bytes", action="store_true", help="tokens are bytes, not words (--context 16 suits them)")
    add("--context", type=positive, default=6, metavar="N", help="tokens that make a query")
    add("--passes", type=positive, default=4, help="how often the text is read")
    add("--chunk-size", type=positive, default=512, help="tokens between two writes")
    add("--whole-text", action="store_true", help="one chunk is the whole text: one write per pass")
    add("--score", choices=("dot", "idw"), default="dot",
        help="how a query is compared with sub-keys. Both recall about the same; with idw the sharpness has no effect, "
        "because a query far longer than all sub-keys is about equally far from all")  # fmt: skip
    add("--write-rule", choices=("paper", "release"), default="paper",
        help="release writes topk times as much: a lower loss, but it diverges with sharp queries")  # fmt: skip
    add("--sharpness", type=float, default=1.0,
        help="multiplies the query. Sharp reads (16) are of few slots, and what other contexts wrote there does not "
        "average out: less is recalled")  # fmt: skip
    add("--topk", type=int, default=8, help="slots read per token")
    add("--sub-keys", type=int, default=512, metavar="P", help="sub-keys per half, for P*P slots")
    add("--key-dim", type=int, default=128, metavar="K", help="length of a query")
    add("--value-dim", type=int, default=64, metavar="V", help="length of a value")
    add("--lr", type=float, default=1.0, help="size of a write")
    add("--addressing-weight", type=float, default=0.0,
        help="moves sub-keys so that reads spread over more slots. These queries are spread as they are, and what was "
        "written before the sub-keys moved is harder to find: no gain, and a loss with sharp queries")  # fmt: skip
    add("--seed", type=int, default=0, help="of all random numbers")
    add("--device", default="cpu", help="cpu or cuda")
    add("--ask", metavar="TEXT", help="the passage to ask for; without: one from the middle of the text")
    add("--plot", default="remember_text.png", metavar="FILE", help="none: no plot")
    add("--json", metavar="FILE", help="where all results go")
    add("--progress", action="store_true", help="draw the progress bar even if stderr is not a terminal")
    return p


def usable(device):
    """The torch.device, if it is here and the operators were built for it."""
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device {device}: PyTorch {torch.__version__} finds no CUDA GPU")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fwpkm::chunk_scan_", device.type.upper()):
        sys.exit(f"--device {device}: this build has no kernel for it (see python -m fwpkm_cuda)")
    return device


@torch.no_grad()
def main(arguments=None):
    args = parser().parse_args(arguments)
    device, n = usable(args.device), args.context
    sources, tokens, vocabulary = read_text(
        args.files or standard_library(), args.max_tokens, args.vocabulary, args.bytes
    )
    if len(tokens) < n + 2:
        sys.exit(f"the text has {len(tokens)} tokens; {n + 2} are needed")
    ids = encode(tokens, vocabulary)
    T, unknown = len(ids), float((ids == UNKNOWN).float().mean())
    (token, _), (previous, _), (context, contexts) = (best_guess(ids, length) for length in (0, 1, n))
    chunk_size = T if args.whole_text else args.chunk_size
    memory = Memory.random(len(vocabulary), args, device)

    guesses = {"token": token, "previous": previous, "context": context}
    about = {"tokens": T, "vocabulary": len(vocabulary), "unknown": unknown, "contexts": contexts}
    print_head(sources, about, guesses, memory, chunk_size)

    passes = []
    for number in range(1, args.passes + 1):
        try:
            bar = progress_bar(number, args.progress or sys.stderr.isatty())
            log = stream(memory, ids.to(device), chunk_size, bar)
        except RuntimeError as error:  # an operator refuses to go on with a memory that diverges
            sys.exit(f"pass {number}: {error}")
        passes.append(summary(log, ids, memory.values))
        print_row(number, passes[-1])

    passage = split(args.ask.encode(), args.bytes) if args.ask else tokens[T // 2 : T // 2 + n + 16]
    asked = ask(memory, ids, tokens, vocabulary, log, passage)
    print_answers(asked, n)
    if args.plot != "none":
        plot(passes, guesses, T, n, args.plot)
    results = {
        "settings": vars(args) | {"files": sources, "chunk_size": chunk_size},
        "versions": {"fwpkm_cuda": fwpkm_cuda.__version__, "torch": str(torch.__version__)},
        "text": about,
        "guesses": guesses,
        "passes": passes,
        "ask": asked,
    }
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
