"""python -m bench compare: two reports of `python -m bench ops`, case by case.

    python -m bench compare OLD.json NEW.json

A difference counts where the two middle halves of the times do not overlap and the medians are more than 5 % apart.
"""

import json

LEAST = 0.05


def pairs(old, new):
    """(case, contestant, times in old, in new) of all that both have measured"""
    for case, record in new["cases"].items():
        before = old["cases"].get(case, {"contestants": {}})["contestants"]
        for name, x in record["contestants"].items():
            if "ms" in x and "ms" in before.get(name, {}):
                yield case, name, before[name]["ms"], x["ms"]


def verdict(old, new):
    """ "faster", "slower" or "" """
    change = new["median"] / old["median"]
    if change < 1 - LEAST and new["q3"] < old["q1"]:
        return "faster"
    return "slower" if change > 1 + LEAST and new["q1"] > old["q3"] else ""


def names(report):
    return {
        (case, name)
        for case, record in report["cases"].items()
        for name, x in record["contestants"].items()
        if "ms" in x
    }


def lines(old, new):
    for which, report in (("old", old), ("new", new)):
        m = report["machine"]
        yield f"{which}: {m.get('gpu') or m['processor']}, torch {m['torch']}, commit {m['commit']}, {m['date']}"
    if old["machine"].get("gpu") != new["machine"].get("gpu") or old["device"] != new["device"]:
        yield "NOT the same device: what follows says nothing about the code"
    found = list(pairs(old, new))
    width = max([len(f"{case}: {name}") for case, name, *_ in found], default=0)
    counts = {"faster": 0, "slower": 0, "": 0}
    yield f"{'':{width}}{'old ms':>12}{'new ms':>12}{'new/old':>9}"
    for case, name, before, after in found:
        word = verdict(before, after)
        counts[word] += 1
        change = after["median"] / before["median"]
        text = f"{case}: {name}"
        yield f"{text:{width}}{before['median']:12.4f}{after['median']:12.4f}{change:9.2f}  {word}".rstrip()
    yield f"{counts['faster']} faster, {counts['slower']} slower, {counts['']} about as before"
    for which, missing in (("new", names(old) - names(new)), ("old", names(new) - names(old))):
        for case, name in sorted(missing):
            yield f"not in {which}: {case}: {name}"


def add_arguments(parser):
    parser.add_argument("old")
    parser.add_argument("new")


def main(options):
    reports = []
    for path in (options.old, options.new):
        with open(path) as file:
            reports.append(json.load(file))
    print("\n".join(lines(*reports)))
