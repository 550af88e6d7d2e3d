"""SAM 2's memory attention for many objects at once, with what they share computed once.

The layers are those of sam2's ``MemoryAttention``, weight for weight, and the answers theirs up to rounding. Different
is the order of the products. Keys of prompted frames do not depend on the walk that reads them: they are projected and
rotated once. The first layer's queries depend on the frame alone. Values are multiplied by their projection after the
weighted mean, not before it: softmax weights sum to one, and memories have a quarter of the features' width.
Shape letters: B objects, U frames, P locations of a frame, M locations or pointers of a memory, C features of a
location, D features of a memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

_CPU_SCORES = 2**20
_ACCELERATOR_SCORES = 2**26
"""Attention scores that exist at a time."""
_LEAST_KEYS = 1024
"""Keys in one product; fewer would make it slow."""


@dataclass(frozen=True, kw_only=True)
class SharedMemory:
    """Hold the prompted frames' keys, one (M, C) for each layer, and values (M, D), as attention reads them."""

    keys: tuple[torch.Tensor, ...]
    centres: tuple[torch.Tensor, ...]
    """Mean key of each layer, (C,): scores are taken from keys less their mean, which softmax does not see."""
    values: torch.Tensor

    @property
    def bytes(self) -> int:
        """Return how much memory this takes."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.centres, self.values))


@dataclass(frozen=True, kw_only=True)
class OwnMemory:
    """Hold what B objects remember of their own walks: M locations of recent frames, then M' object pointers."""

    tokens_bmd: torch.Tensor
    positions_bmd: torch.Tensor
    pointers: int
    """How many of the last tokens are pointers, which have no place in the image."""


@dataclass(frozen=True, kw_only=True)
class Readers:
    """Name objects that read the same prompted frames and remember equally much besides."""

    rows: list[int]
    shared: SharedMemory
    own: OwnMemory | None


class _Part(NamedTuple):
    """Hold an unfinished softmax-weighted mean: sums relative to 2 to the power of ``top``."""

    weighted: torch.Tensor
    total: torch.Tensor
    top: torch.Tensor


class MemoryReader:
    """Read memories with the weights of a model; ``dtype`` is the format of the products' factors."""

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        attention = model.memory_attention
        self._norm = attention.norm
        self._dtype = dtype
        self._scores = _CPU_SCORES if device.type == "cpu" else _ACCELERATOR_SCORES
        grid = model.image_size // 16
        blank = torch.zeros(1, model.hidden_dim, grid, grid, device=device)
        self._position_pc = 0.1 * model.image_encoder.neck.position_encoding(blank).flatten(2)[0].T
        self._layers = [_Layer(layer, device, dtype) for layer in attention.layers]
        if not (attention.pos_enc_at_input and attention.batch_first):
            raise ValueError("this memory attention is not built as SAM 2's")

    def share(self, tokens_md: torch.Tensor, positions_md: torch.Tensor) -> SharedMemory:
        """Project prompted frames' locations; M is a multiple of a frame's."""
        raw = [layer.keys(tokens_md[None], positions_md[None], 0)[0] for layer in self._layers]
        centres = tuple(keys_mc.mean(dim=0) for keys_mc in raw)
        keys = tuple((k - centre).to(self._dtype) for k, centre in zip(raw, centres, strict=True))
        return SharedMemory(keys=keys, centres=centres, values=tokens_md.to(self._dtype))

    def read(self, frames_upc: torch.Tensor, frame_b: Sequence[int], readers: Sequence[Readers]) -> torch.Tensor:
        """Return the features of each object's frame after attention to its memories, (B, P, C) float32.

        ``frame_b`` says which of the frames each object stands on; every object is in one of ``readers``.
        """
        index_b = torch.tensor(frame_b, device=frames_upc.device)
        x_upc = frames_upc.float().contiguous() + self._position_pc
        first = self._layers[0]
        x_upc = x_upc + first.look_at_itself(x_upc, self._attend)
        query_upc = first.query(x_upc)
        x_bpc = x_upc[index_b]
        for number, layer in enumerate(self._layers):
            if number:
                x_bpc = x_bpc + layer.look_at_itself(x_bpc, self._attend)
                query_bpc = layer.query(x_bpc)
            else:
                query_bpc = query_upc[index_b]
            found_bpd = torch.empty(*x_bpc.shape[:2], layer.memory_features, device=x_bpc.device)
            for group in readers:
                rows = torch.tensor(group.rows, device=x_bpc.device)
                if number:
                    shared = self._look_at_shared(query_bpc[rows], group.shared, number)
                else:
                    seen = sorted({frame_b[row] for row in group.rows})
                    once = self._look_at_shared(query_upc[seen], group.shared, number)
                    which = torch.tensor([seen.index(frame_b[row]) for row in group.rows], device=x_bpc.device)
                    shared = _Part(*(part[which] for part in once))
                parts = [shared]
                if group.own is not None:
                    parts.append(self._look_at_own(query_bpc[rows], group, layer, number))
                found_bpd[rows] = _joined(parts)
            x_bpc = x_bpc + layer.of_memory(found_bpd)
            x_bpc = x_bpc + layer.feed_forward(x_bpc)
        read: torch.Tensor = self._norm(x_bpc)
        return read.float()

    def _look_at_shared(self, query_bpc: torch.Tensor, shared: SharedMemory, layer: int) -> _Part:
        count, locations, features = query_bpc.shape
        rows = query_bpc.reshape(1, count * locations, features)
        part = self._attend(rows, shared.keys[layer][None], shared.values[None])
        return _Part(*(t.reshape(count, locations, -1) for t in part))

    def _look_at_own(self, query_bpc: torch.Tensor, group: Readers, layer: _Layer, number: int) -> _Part:
        own = group.own
        assert own is not None
        keys_bmc = layer.keys(own.tokens_bmd, own.positions_bmd, own.pointers) - group.shared.centres[number]
        return self._attend(query_bpc, keys_bmc.to(self._dtype), own.tokens_bmd.to(self._dtype))

    def _attend(self, query_brc: torch.Tensor, keys_bmc: torch.Tensor, values_bmd: torch.Tensor) -> _Part:
        """Attend block by block, so that the scores stay where the next product finds them quickly."""
        count, rows, _ = query_brc.shape
        rows_at_once = min(rows, max(1, self._scores // _LEAST_KEYS))
        together = max(1, self._scores // (rows_at_once * _LEAST_KEYS))
        keys_at_once = max(_LEAST_KEYS, self._scores // (rows_at_once * min(count, together)))
        found = []
        for b in range(0, count, together):
            taken = slice(b, b + together)
            blocks = [
                self._attend_block(block, keys_bmc[taken], values_bmd[taken], keys_at_once)
                for block in query_brc[taken].split(rows_at_once, dim=1)
            ]
            found.append(_Part(*(torch.cat(parts, dim=1) for parts in zip(*blocks, strict=True))))
        return found[0] if len(found) == 1 else _Part(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _attend_block(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, keys_at_once: int) -> _Part:
        parts: _Part | None = None
        for m in range(0, keys.shape[1], keys_at_once):
            scores = torch.matmul(query, keys[:, m : m + keys_at_once].transpose(1, 2)).float()
            top = scores.amax(dim=2, keepdim=True)
            if parts is not None:
                top = torch.maximum(top, parts.top)
            weights = scores.sub_(top).exp2_()
            total = weights.sum(dim=2, keepdim=True)
            weighted = torch.matmul(weights.to(values.dtype), values[:, m : m + keys_at_once]).float()
            if parts is not None:
                kept = (parts.top - top).exp2_()
                total, weighted = total + kept * parts.total, weighted + kept * parts.weighted
            parts = _Part(weighted, total, top)
        assert parts is not None
        return parts


class _Layer:
    """Hold one layer's weights in the format of the products."""

    def __init__(self, layer: Any, device: torch.device, dtype: torch.dtype) -> None:
        own, memory = layer.self_attn, layer.cross_attn_image
        if own.num_heads != 1 or memory.num_heads != 1 or layer.pos_enc_at_attn or layer.pos_enc_at_cross_attn_queries:
            raise ValueError("this memory attention is not built as SAM 2's")
        self._layer = layer
        self._dtype = dtype
        self._turns = own.freqs_cis.to(device)
        # Scores to the base of two: torch takes such powers four times as fast.
        scale = math.log2(math.e) / math.sqrt(own.internal_dim)
        self._own_qkv = [_cast(own.q_proj, dtype, scale), _cast(own.k_proj, dtype), _cast(own.v_proj, dtype)]
        self._own_out = _cast(own.out_proj, dtype)
        self._query = _cast(memory.q_proj, dtype, scale)
        self._key = _cast(memory.k_proj, dtype)
        # The two projections after the weighted mean are one.
        out_cc, value_cd = memory.out_proj.weight.double(), memory.v_proj.weight.double()
        bias_c = out_cc @ memory.v_proj.bias.double() + memory.out_proj.bias.double()
        self._of_memory = ((out_cc @ value_cd).to(dtype), bias_c.to(dtype))
        self._up, self._down = _cast(layer.linear1, dtype), _cast(layer.linear2, dtype)
        self.memory_features = int(value_cd.shape[1])

    def look_at_itself(
        self, x_bpc: torch.Tensor, attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], _Part]
    ) -> torch.Tensor:
        """Return what self-attention adds."""
        normed = self._layer.norm1(x_bpc).to(self._dtype)
        query, key, value = (linear(normed, *weights) for weights in self._own_qkv)
        query, key = (self._turned(part.float()).to(self._dtype) for part in (query, key))
        return linear(_joined([attend(query, key, value)]).to(self._dtype), *self._own_out).float()

    def query(self, x_bpc: torch.Tensor) -> torch.Tensor:
        """Return the queries to the memory, scaled so that a product with the keys is a power of two."""
        query = linear(self._layer.norm2(x_bpc).to(self._dtype), *self._query)
        return self._turned(query.float()).to(self._dtype)

    def keys(self, tokens_bmd: torch.Tensor, positions_bmd: torch.Tensor, pointers: int) -> torch.Tensor:
        """Return the memories' keys, (B, M, C) float32; the last ``pointers`` of them are not turned by place."""
        keys_bmc = linear((tokens_bmd + positions_bmd).to(self._dtype), *self._key).float()
        count, total, features = keys_bmc.shape
        placed = total - pointers
        if not placed:
            return keys_bmc
        spots = self._turns.shape[0]
        turned = self._turned(keys_bmc[:, :placed].reshape(count * (placed // spots), spots, features))
        turned = turned.reshape(count, placed, features)
        return turned if not pointers else torch.cat([turned, keys_bmc[:, placed:]], dim=1)

    def of_memory(self, found_bpd: torch.Tensor) -> torch.Tensor:
        """Return what attention to the memory adds."""
        return linear(found_bpd.to(self._dtype), *self._of_memory).float()

    def feed_forward(self, x_bpc: torch.Tensor) -> torch.Tensor:
        """Return what the layer's perceptron adds."""
        hidden = self._layer.activation(linear(self._layer.norm3(x_bpc).to(self._dtype), *self._up))
        return linear(hidden, *self._down).float()

    def _turned(self, x_bpc: torch.Tensor) -> torch.Tensor:
        """Rotate pairs of features by their location's angles (RoPE)."""
        pairs = torch.view_as_complex(x_bpc.reshape(*x_bpc.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self._turns).flatten(2)


def _cast(layer: torch.nn.Linear, dtype: torch.dtype, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    return (layer.weight.float() * scale).to(dtype), (layer.bias.float() * scale).to(dtype)


def _joined(parts: Sequence[_Part]) -> torch.Tensor:
    """Finish a softmax-weighted mean over memories that were read apart."""
    if len(parts) == 1:
        return parts[0].weighted / parts[0].total
    first, second = parts
    top = torch.maximum(first.top, second.top)
    shares = [(part.top - top).exp2_() for part in parts]
    total = shares[0] * first.total + shares[1] * second.total
    return (shares[0] * first.weighted + shares[1] * second.weighted) / total
