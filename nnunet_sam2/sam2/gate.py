"""A gate on the mask decoder: its tokens read the image in proportion to a soft mask.

Shape letters: K prompts, T tokens, P locations of the embedding grid, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d, scaled_dot_product_attention

_LEAST = 1e-20
"""What zero stands for: a true zero everywhere would leave nothing to read."""


@contextmanager
def gated(decoder: Any, gate_khw: torch.Tensor | None) -> Iterator[None]:
    """Let the decoder's tokens attend to locations in proportion to ``gate_khw``, as long as the context lasts.

    ``gate_khw`` (0 to 1) is averaged over each location of the embedding grid and multiplies the attention weights from
    tokens to image in every layer before they are normalised: a gate of one everywhere changes nothing, and what lies
    where the gate is zero has no influence on the tokens. (The mask attention that SAM2-SGP describes; in its released
    code a softmax over one channel makes every weight one.) None leaves the decoder alone.
    """
    if gate_khw is None:
        yield
        return
    transformer = decoder.transformer
    readers = [layer.cross_attn_token_to_image for layer in transformer.layers]
    readers.append(transformer.final_attn_token_to_image)
    for reader in readers:
        reader.forward = partial(_attend, reader, gate_khw)
    try:
        yield
    finally:
        for reader in readers:
            del reader.forward  # the class's own comes back


def _attend(reader: Any, gate_khw: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Do what sam2's ``Attention.forward`` does, with the gate's logarithm added to the scores."""
    grid = round(k.shape[1] ** 0.5)
    weight_kp = adaptive_avg_pool2d(gate_khw.to(k.device, k.dtype)[:, None], grid).flatten(1).clamp(_LEAST, 1.0)
    q, k, v = reader.q_proj(q), reader.k_proj(k), reader.v_proj(v)
    q, k, v = (reader._separate_heads(part, reader.num_heads) for part in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=weight_kp.log()[:, None, None, :].to(q.dtype))
    attended: torch.Tensor = reader.out_proj(reader._recombine_heads(out))
    return attended
