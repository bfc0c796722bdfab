"""What the project set out to reach on a GPU (H200), and whether a report of `python -m bench ops` did."""

GATHERED, WRITTEN = 0.80, 0.75  # of the copy bandwidth
DISTINCT = 30_000  # rows that make a gather count
SEARCH_TO_PRODUCTS, EAGER_TO_SEARCH = 3, 10
TRAINING_US, INFERENCE_US, DECODE_US = 230, 30, 10  # a chunk, a chunk, a token
RELEASE_TRAINING, RELEASE_INFERENCE = 18, 80  # times as fast
RELEASE_RETAINED, RELEASE_PEAK = 8, 15  # times less memory
HOT = 1.5  # times as long as uniform slots
PKM = 2  # times as fast as embedding_bag
RIVAL_MS, RIVAL_GB = 16, 3


def contestant(report, start, name="ours", unless=()):
    """(record, figures) of a contestant in the first case whose name begins so; None if it has no times."""
    for case, record in report["cases"].items():
        if case.startswith(start) and not any(word in case for word in unless):
            x = record["contestants"].get(name, {})
            if "ms" in x and "failed" not in x:
                return record, x
    return None


def milliseconds(report, start, name="ours", unless=()):
    found = contestant(report, start, name, unless)
    return found and found[1]["ms"]["median"]


def ratio(a, b):
    return a / b if a is not None and b else None


def goals(report):
    """(what, figure as text or None, whether it is met) of each goal"""

    def at_most(what, figure, goal, unit=""):
        text = None if figure is None else f"{figure:.3g}{unit}, goal at most {goal}{unit}"
        return what, text, figure is not None and figure <= goal

    def at_least(what, figure, goal, unit="x"):
        text = None if figure is None else f"{figure:.3g}{unit}, goal at least {goal}{unit}"
        return what, text, figure is not None and figure >= goal

    ms = lambda start, name="ours", unless=(): milliseconds(report, start, name, unless)
    copy = report["ceilings"].get("copy_bytes_per_second")
    yield at_least("gather of many rows, of the copy bandwidth", gathered(report, copy), round(100 * GATHERED), " %")
    yield at_least("write with a log, of the copy bandwidth", written(report, copy), round(100 * WRITTEN), " %")
    search = "score_topk, M=4096 H=1 R=8 dot float32"
    yield at_most(
        "search, to its matrix products alone", ratio(ms(search), ms(search, "matrix products alone")),
        SEARCH_TO_PRODUCTS, "x",
    )  # fmt: skip
    yield at_least("search, as fast as eager PyTorch", ratio(ms(search, "eager"), ms(search)), EAGER_TO_SEARCH)

    train, infer, decode = "layer_train, h1k8 B=8", "layer_infer, h1k8 B=1", "decode, h1k8, read"
    per_chunk = lambda start, name: chunk_us(contestant(report, start, name))
    yield at_most(
        "training, forward and backward, a chunk", per_chunk(train, "ours without commit"), TRAINING_US, " us"
    )
    yield at_least("training, as fast as the release", ratio(ms(train, "release"), ms(train)), RELEASE_TRAINING)
    long = "layer_infer, h1k8 B=1 T=131072 C=512"
    yield at_least(
        "inference over 128K, as fast as the release", ratio(ms(long, "release"), ms(long)), RELEASE_INFERENCE
    )
    yield at_most("inference, a chunk", per_chunk(infer, "ours"), INFERENCE_US, " us")
    token = ms(decode, "ours, graph", unless=("written",))
    yield at_most("a decoded token in a CUDA graph", token and 1e3 * token, DECODE_US, " us")
    for what, goal in (("retained", RELEASE_RETAINED), ("peak", RELEASE_PEAK)):
        amounts = [contestant(report, train, name) for name in ("release", "ours")]
        theirs, mine = (found and found[1].get(f"{what}_bytes") for found in amounts)
        yield at_least(f"{what} memory of training, less than the release's", ratio(theirs, mine), goal)
    yield at_most("slots that all tokens read, to uniform slots", *hottest(report), "x")
    tokens = "pkm, 32768 tokens h4 r32, read, uniform"
    yield at_least("slow-weight PKM, as fast as embedding_bag", ratio(ms(tokens, "embedding_bag"), ms(tokens)), PKM)
    rival = contestant(report, "rival", "ours without commit")
    yield at_most("the rival's shape", rival and rival[1]["ms"]["median"], RIVAL_MS, " ms")
    peak = rival and rival[1].get("peak_bytes")
    yield at_most("the rival's shape, peak memory", peak and peak / 1e9, RIVAL_GB, " GB")


def chunk_us(found):
    return found and 1e3 * found[1]["ms"]["median"] / found[0]["per"]


def gathered(report, copy):
    """%, of the slowest gather of enough distinct rows."""
    shares = [
        record["bytes"] / (1e-3 * record["contestants"]["ours"]["ms"]["median"]) / copy
        for record in report["cases"].values()
        if record["family"] == "gather"
        and record["facts"].get("distinct", 0) > DISTINCT
        and "ms" in record["contestants"]["ours"]
    ]
    return 100 * min(shares) if shares and copy else None


def written(report, copy):
    """%: a chunk with its write less the same without; each distinct row read once and written once."""
    case = "update, log, uniform"
    whole, read = contestant(report, case), contestant(report, case, "ours, read only")
    if not (whole and read and copy):
        return None
    seconds = 1e-3 * (whole[1]["ms"]["median"] - read[1]["ms"]["median"])
    return 100 * 2 * whole[0]["facts"]["row_bytes"] / seconds / copy if seconds > 0 else None


def hottest(report):
    """The worst slowdown of a case by the hot distribution, and the goal."""
    slower = []
    for case, record in report["cases"].items():
        if not case.endswith("hot-8") or record["family"] == "segments":
            continue
        same = case.removesuffix("hot-8") + "uniform"
        if same not in report["cases"]:  # layer_infer has its uniform case without the word
            same = case.removesuffix(", hot-8")
        slower.append(ratio(milliseconds(report, case), milliseconds(report, same)))
    found = [x for x in slower if x is not None]
    return max(found) if found else None, HOT


def lines(report):
    """The goals as text; they are a GPU's."""
    if report["device"] != "cuda":
        yield "goals of the GPU: only with --device cuda (python -m bench cpu has those of the CPU)"
        return
    for what, figure, met in goals(report):
        yield f"{what}: {'not measured' if figure is None else figure + (' met' if met else ' NOT met')}"
