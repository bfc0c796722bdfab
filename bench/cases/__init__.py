"""What `python -m bench ops` measures, by family. A family is a function of a `Setup` that gives (name, function that
makes the `Case`) one after the other; the ceilings come first, for everything else is measured by them."""

from bench.cases import ceilings, pkm, rows, scan, search

FAMILIES = {
    "ceilings": ceilings.ceilings,
    "score_topk": search.score_topk,
    "gather": rows.gather,
    "segments": rows.segments,
    "commit": rows.commit,
    "update": scan.update,
    "addressing": scan.addressing,
    "backward": scan.backward,
    "layer_train": scan.layer_train,
    "layer_infer": scan.layer_infer,
    "decode": scan.decode,
    "rival": scan.rival,
    "memory": scan.memory,
    "pkm": pkm.pkm,
}
