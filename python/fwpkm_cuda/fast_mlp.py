"""The dense counterpart of the product key memory: a gated MLP whose weights are written while it is read.

The baseline that a sparse memory has to beat. Plain PyTorch: it is made of matrix products over all of its weights,
and autograd gives its write as well as the gradients through it. Its chunks and its life cycle are those of `Memory`.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_choice, check_finite, check_whole
from .memory import FastWeights, scan_options


class MLPWeights(NamedTuple):
    """Q inputs, N hidden units, V outputs."""

    w_up: Tensor  # (N, Q)
    b_up: Tensor  # (N,)
    w_gate: Tensor  # (N, Q)
    b_gate: Tensor  # (N,)
    w_down: Tensor  # (V, N)
    b_down: Tensor  # (V,)


class MLPScan(NamedTuple):
    """Result of `mlp_scan`. W writes, Q' pairs per row."""

    out: Tensor  # (B, T, V)
    losses: Tensor  # (B, Q')  memory loss of each pair, in the order of the writes
    w_up: Tensor  # the weights after the last write
    b_up: Tensor
    w_gate: Tensor
    b_gate: Tensor
    w_down: Tensor
    b_down: Tensor


def mlp_read(weights, query):
    """W_down ((W_up q + b_up) * silu(W_gate q + b_gate)) + b_down.  (..., Q) -> (..., V)"""
    up, gate = F.linear(query, weights.w_up, weights.b_up), F.linear(query, weights.w_gate, weights.b_gate)
    return F.linear(up * F.silu(gate), weights.w_down, weights.b_down)


def mlp_loss(out, target, loss_weights=None, mask=None, *, lookahead=1, lookahead_target="mean", loss="mse"):
    """l_x = w_x mean_c |out_x - t_x|^2 ("mse") or |out_x - t_x| ("mae"), w_x = mask_x loss_weight_x, for x < n - L.

    t_x: mean of target_x .. target_{x+L} ("mean"), or target_{x+L} ("last").  (B, n, V) -> (B, max(n - L, 0))"""
    pairs = max(out.shape[1] - lookahead, 0)
    if lookahead_target == "mean":
        target = torch.stack([target[:, i : i + pairs] for i in range(lookahead + 1)]).mean(0)
    difference = out[:, :pairs] - target[:, target.shape[1] - pairs :]
    if mask is not None:  # a masked token may have anything, NaN too, for a target and a loss weight
        difference = difference.masked_fill(~mask[:, :pairs, None], 0)
    losses = difference.square().mean(-1) if loss == "mse" else difference.abs().mean(-1)
    if loss_weights is not None:
        weights = loss_weights[:, :pairs]
        losses = losses * (weights if mask is None else weights.masked_fill(~mask[:, :pairs], 0))
    return losses


def mlp_write(weights, losses, lr=0.1, weight_decay=0.0, grad_clip=None, create_graph=False):
    """w <- w - lr (clip(g) + weight_decay w), g the gradient of the mean of all losses (masked ones count in it)."""
    gradients = [torch.zeros_like(w) for w in weights]
    if losses.numel():
        gradients = torch.autograd.grad(losses.mean(), weights, create_graph=create_graph)
    if grad_clip is not None:
        gradients = [g.clamp(-grad_clip, grad_clip) for g in gradients]
    return MLPWeights(*(w - lr * (g + weight_decay * w) for w, g in zip(weights, gradients, strict=True)))


def mlp_scan(
    weights,
    query,
    target,
    loss_weights=None,
    mask=None,
    *,
    chunk_size,
    lookahead=1,
    lookahead_target="mean",
    loss="mse",
    lr=0.1,
    weight_decay=0.0,
    grad_clip=None,
    carried=0,
    flush=True,
) -> MLPScan:
    """Reads every token with the weights of its chunk, and writes the weights after each chunk, differentiably.

    weights `MLPWeights`, query (B, T, Q), target (B, T, V), loss_weights (B, T) or None, mask (B, T) bool or None ->
    `MLPScan`; nothing given is changed. Options as in `fwpkm_cuda.chunk_scan`, `mlp_loss` and `mlp_write`; pairs across
    a chunk's edge are left out. flush=False: a partial last chunk is read but not written. carried: 0."""
    check_options(chunk_size, lookahead, lookahead_target, loss, lr, weight_decay, grad_clip)
    _check_tokens(weights, query, target, loss_weights, mask)
    B, T = query.shape[:2]
    differentiable = torch.is_grad_enabled()
    with torch.inference_mode(False):  # autograd cannot write with tensors of inference mode
        weights = MLPWeights(*(w.clone() if w.is_inference() else w for w in weights))
        tokens = (query, target, loss_weights, mask)
        query, target, loss_weights, mask = (x.clone() if x is not None and x.is_inference() else x for x in tokens)
    query, target = query.to(weights.w_up.dtype), target.to(weights.w_up.dtype)
    outs, losses = [query.new_empty(B, 0, target.shape[2])], [query.new_empty(B, 0)]
    for start in range(0, T, chunk_size):
        stop = min(start + chunk_size, T)
        q, t, g, m = (None if x is None else x[:, start:stop] for x in (query, target, loss_weights, mask))
        with _recording(query.device.type):
            live = MLPWeights(*(w if w.requires_grad else w.detach().requires_grad_() for w in weights))
            out = mlp_read(live, q)
            outs.append(out if differentiable else out.detach())
            if stop - start < chunk_size and not flush:
                break
            pairs = mlp_loss(out, t, g, m, lookahead=lookahead, lookahead_target=lookahead_target, loss=loss)
            _check_finite_losses(pairs)
            weights = mlp_write(live, pairs, lr, weight_decay, grad_clip, create_graph=differentiable)
        losses.append(pairs if differentiable else pairs.detach())
        if not differentiable:
            weights = MLPWeights(*(w.detach() for w in weights))
    return MLPScan(torch.cat(outs, 1), torch.cat(losses, 1), *weights)


@contextmanager
def _recording(device_type):
    """The write is autograd's, wherever the scan is called: under no_grad, in inference mode, under autocast too (the
    weights keep their precision)."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False):
        yield


def check_options(chunk_size, lookahead, lookahead_target, loss, lr, weight_decay, grad_clip):
    check_whole(chunk_size=chunk_size)
    check_whole(at_least=0, lookahead=lookahead)
    check_choice("lookahead_target", lookahead_target, ("mean", "last"))
    check_choice("loss", loss, ("mse", "mae"))
    check_finite(lr=lr, weight_decay=weight_decay)
    if grad_clip is not None:
        check_finite(grad_clip=grad_clip)
        if grad_clip < 0:
            raise ValueError(f"grad_clip: expected None or a number, 0 or more, got {grad_clip}")


def _check_finite_losses(losses):
    """On the CPU; elsewhere it would wait for the device."""
    if losses.device.type == "cpu" and not losses.isfinite().all():
        raise RuntimeError("query, target, loss_weights: expected finite losses, got NaN or infinity")


def _check_tokens(weights, query, target, loss_weights, mask):
    (V, _), Q = weights.w_down.shape, weights.w_up.shape[1]
    if query.dim() != 3 or query.shape[2] != Q:
        raise ValueError(f"query: expected shape (B, T, {Q}), got {tuple(query.shape)}")
    if target.shape != (*query.shape[:2], V):
        raise ValueError(f"target: expected shape {(*query.shape[:2], V)}, got {tuple(target.shape)}")
    for name, x in (("loss_weights", loss_weights), ("mask", mask)):
        if x is not None and x.shape != query.shape[:2]:
            raise ValueError(f"{name}: expected shape {tuple(query.shape[:2])}, got {tuple(x.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool, got {mask.dtype}")


class MLPMemory(FastWeights):
    """Fast weights of an MLP (`MLPWeights`). `scan` returns an `MLPScan`, as does `stream`; options of `mlp_scan`.

    `MLPMemory(*weights)` holds the tensors given, without a copy; `random` draws fresh ones."""

    KIND = "fast-weight MLP"
    NAMES = CONTENT = MLPWeights._fields
    PER_TOKEN = ("out",)
    OPTIONS = scan_options(mlp_scan)

    def __init__(self, *tensors, seed=None):
        weights = MLPWeights(*tensors)
        for name in ("w_up", "w_down"):
            if getattr(weights, name).dim() != 2:
                raise ValueError(f"{name}: expected a matrix, got shape {tuple(getattr(weights, name).shape)}")
        (N, Q), V = weights.w_up.shape, weights.w_down.shape[0]
        expected = self.shapes(key_dim=Q, value_dim=V, hidden_units=N)
        for name, t, shape in zip(self.NAMES, weights, expected, strict=True):
            if t.shape != shape or t.dtype not in (torch.float32, torch.float64) or t.dtype != tensors[0].dtype:
                raise ValueError(
                    f"{name}: expected shape {shape} of float32 or float64, got {tuple(t.shape)}, {t.dtype}"
                )
        super().__init__(weights, seed)

    @classmethod
    def random(cls, key_dim=512, value_dim=512, hidden_units=2304, *, seed=None, device=None, dtype=torch.float32):
        """As the release: normal weights with variance one over their inputs, zero biases."""
        sizes = dict(key_dim=key_dim, value_dim=value_dim, hidden_units=hidden_units)
        return cls._random(sizes, seed, device, dtype)

    @staticmethod
    def shapes(key_dim, value_dim, hidden_units):
        Q, V, N = key_dim, value_dim, hidden_units
        return MLPWeights((N, Q), (N,), (N, Q), (N,), (V, N), (V,))

    @property
    def weights(self):
        return MLPWeights(**self._tensors)

    def _draw(self, name, generator):
        w = self._tensors[name]
        w.normal_(0, w.shape[1] ** -0.5, generator=generator) if name.startswith("w_") else w.zero_()

    def _scan(self, tokens, **options):
        return mlp_scan(self.weights, *tokens, **options)

    def _scan_(self, tokens, **options):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tokens):
            raise RuntimeError(
                "stream writes in place and has no derivative: call it under torch.no_grad(), or use scan"
            )
        with torch.no_grad():
            result = mlp_scan(self.weights, *tokens, **options)
            self._commit(result)
        return result

    def _repeat(self, tokens, options):
        if self.pending is None:  # the write's own backward pass has run into the hooks of the checkpoint
            raise RuntimeError("scan: an MLPMemory is scanned under checkpoint(..., use_reentrant=True), or under none")
        return super()._repeat(tokens, options)

    def _reading(self, scan):
        return scan

    def _commit(self, scan, **_):
        for name, w in self._tensors.items():
            w.copy_(getattr(scan, name))
