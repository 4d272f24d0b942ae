"""The memory of our decoders as a cache of Hugging Face's."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from gramian.errors import InputError
from gramian.nn.view import Past

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls the cache: `cache` from 5.24 on."""


class PastLayer(CacheLayerMixin):
    """One layer's `Past` as a layer of a Hugging Face cache."""

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.past = Past()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: D102
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return self.past.append(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: D102
        return self.past.length + query_length, 0

    def get_seq_length(self) -> int:  # noqa: D102
        return self.past.length

    def get_max_length(self) -> int:  # noqa: D102
        return -1

    get_max_cache_shape = get_max_length  # its earlier name

    def reset(self) -> None:  # noqa: D102
        self.past = Past()

    def reorder_cache(self, beam_idx: Tensor) -> None:  # noqa: D102
        self.past.reorder(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:  # noqa: D102
        self.past.reorder(torch.arange(self.past.sequences).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last −n tokens, or, as callers earlier asked by a positive n, all but the first n."""
        kept = tokens_to_remove if tokens_to_remove > 0 else self.past.length + tokens_to_remove
        self.past.crop(kept)


def memory_of(cache: Cache, depth: int) -> list[Past]:
    """Return the memories of a cache's layers, which an empty dynamic cache gets here.

    Raises: InputError for another kind of cache, or one that another model filled.
    """
    if isinstance(cache, DynamicCache) and not cache.offloading and cache.get_seq_length() == 0:
        cache.layers[:] = [PastLayer() for _ in range(depth)]
    memory = [layer.past for layer in cache.layers if isinstance(layer, PastLayer)]
    if len(memory) != depth:
        raise InputError(
            "these models decode with a DynamicCache that is empty or their own, and not offloaded, got a "
            f"{type(cache).__name__} of {len(cache.layers)} layers"
        )
    return memory
