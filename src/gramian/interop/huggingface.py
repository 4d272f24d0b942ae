"""Our transformers as Hugging Face models: saved, loaded, generated from and trained with their tools.

Importing this module registers them, so that AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM and
AutoModelForSequenceClassification open the folders of `gramian train` and of `save_pretrained`.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput, SequenceClassifierOutput

from gramian.errors import InputError
from gramian.nn.attention import Attention
from gramian.nn.init import Reparametrised
from gramian.nn.transformer import Positions, Transformer, TransformerConfig
from gramian.nn.view import Past


@strict
@dataclass(repr=False)
class GramianConfig(PreTrainedConfig):
    """The fields of `TransformerConfig`, with what Hugging Face needs beside them."""

    model_type = "gramian"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012  (the base class declares it)
        "vocab_size": "vocabulary",
        "hidden_size": "width",
        "intermediate_size": "mlp_width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "num_key_value_heads": "key_heads",
        "max_position_embeddings": "context",
        "hidden_act": "activation",
        "tie_word_embeddings": "tied",
        "initializer_range": "init_std",
    }

    vocabulary: int = 50257
    block: str = "pre_norm"
    causal: bool = True
    width: int = 768
    depth: int = 12
    heads: int = 12
    context: int = 1024
    mlp_width: int | None = None
    norm: str = "rmsnorm"
    activation: str = "relu"
    positions: str = "learned"
    tied: bool = True
    final_norm: bool = True
    init_std: float | None = None
    key_heads: int | None = None
    gated: bool = False
    mlp_gain: float = 0.1
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0

    def shape(self) -> TransformerConfig:
        """Return the transformer's own configuration.

        Raises: InputError as `TransformerConfig`.
        """
        return TransformerConfig(
            **{field.name: getattr(self, field.name) for field in fields(TransformerConfig)}
        )


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

    def reset(self) -> None:  # noqa: D102
        self.past = Past()

    def reorder_cache(self, beam_idx: Tensor) -> None:  # noqa: D102
        self.past.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:  # noqa: D102
        self.past.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:  # noqa: D102
        self.past.reorder(torch.arange(self.past.sequences).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:  # noqa: D102
        self.past.crop(self.past.length - abs(tokens_to_remove))


def memory_of(cache: Cache, depth: int) -> list[Past]:
    """Return the memories of a cache's layers, which an empty dynamic cache gets here.

    Raises: InputError for another kind of cache.
    """
    if cache.get_seq_length() == 0 and isinstance(cache, DynamicCache):
        cache.layers = [PastLayer() for _ in range(depth)]
    if not all(isinstance(layer, PastLayer) for layer in cache.layers):
        raise InputError(f"these models decode with a DynamicCache, got a {type(cache).__name__}")
    return [layer.past for layer in cache.layers if isinstance(layer, PastLayer)]


class GramianPreTrainedModel(PreTrainedModel):
    """What the three models share."""

    config: GramianConfig
    config_class = GramianConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("Chain", "Residual")

    def __init__(self, config: GramianConfig) -> None:
        super().__init__(config)
        self.transformer = Transformer(config.shape())

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as Hugging Face does, but refuse weights of another block or shape.

        Raises: InputError naming a weight of the transformer that the checkpoint lacks or does not know.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for kind in ("missing_keys", "unexpected_keys"):
            names = sorted(name for name in info[kind] if name.startswith("transformer.blocks."))
            if names:
                verb = "lacks" if kind == "missing_keys" else "holds"
                raise InputError(
                    f"the checkpoint {verb} {names[0]} (and {len(names) - 1} more): it is not of "
                    f"{model.config.depth} blocks {model.config.block!r}"
                )
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Fill what a checkpoint did not bring."""
        loaded = any(getattr(p, "_is_hf_initialized", False) for p in module.parameters())
        if isinstance(module, (nn.Linear, nn.Embedding)):  # Hugging Face's guard spares what was loaded
            nn.init.normal_(module.weight, std=self.transformer.config.std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (Attention, Reparametrised, Positions)) and not loaded:
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
            seed = int(torch.randint(2**31, ()))
            module.initialise_(torch.Generator(device).manual_seed(seed))

    def get_input_embeddings(self) -> nn.Module:  # noqa: D102
        return self.transformer.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:  # noqa: D102
        self.transformer.embedding = value

    def get_output_embeddings(self) -> nn.Module:  # noqa: D102
        return self.transformer.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:  # noqa: D102
        self.transformer.head = new_embeddings

    def _features(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """Return what the head reads; `hidden` takes the stream entering each block and leaving the last.

        Positions that start again at zero, without a mask, mark packed documents.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give either input_ids or inputs_embeds, not both or neither")
        if inputs_embeds is not None:
            input_ids = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        documents = None
        if position_ids is not None and attention_mask is None and cache is None:
            documents = (position_ids == 0).cumsum(-1).expand_as(input_ids)
        past = None if cache is None else memory_of(cache, self.config.depth)
        handles = []
        if hidden is not None:
            blocks = self.transformer.blocks
            handles = [b.register_forward_pre_hook(lambda _, args: hidden.append(args[0])) for b in blocks]
            handles.append(blocks[-1].register_forward_hook(lambda _, args, y: hidden.append(y)))
        try:
            return self.transformer.features(input_ids, attention_mask, documents, past, inputs_embeds)
        finally:
            for handle in handles:
                handle.remove()


class GramianForCausalLM(GramianPreTrainedModel, GenerationMixin):
    """A decoder that predicts the next token, and generates."""

    _tied_weights_keys = {"transformer.head.weight": "transformer.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: GramianConfig) -> None:
        if not config.causal:
            raise InputError(
                "this run was trained with the masked objective; open it as a masked language model"
            )
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, the loss of predicting each next label, and the cache.

        The cache carries no gradient, so that it is made by default only where gradients are off.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        features = self._features(
            input_ids, attention_mask, inputs_embeds, position_ids, past_key_values, hidden
        )
        logits = self.transformer.head(features[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocabulary, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=None if hidden is None else tuple(hidden),
        )


class GramianForMaskedLM(GramianPreTrainedModel):
    """An encoder that predicts masked tokens."""

    _tied_weights_keys = {"transformer.head.weight": "transformer.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: GramianConfig) -> None:
        if config.causal:
            raise InputError(
                "this run was trained with the causal objective; open it as a causal language model"
            )
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Return logits and the loss at the labels that are not −100."""
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        features = self._features(input_ids, attention_mask, inputs_embeds, position_ids, hidden=hidden)
        logits = self.transformer.head(features)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocabulary, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=None if hidden is None else tuple(hidden)
        )


class GramianForSequenceClassification(GramianPreTrainedModel):
    """A transformer whose pooled features a linear map turns into labels.

    An encoder's features are averaged over the real tokens; a decoder's are those of the last real token.
    """

    _keys_to_ignore_on_load_unexpected = (r"transformer\.head\.weight",)

    def __init__(self, config: GramianConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer.head = nn.Identity()
        self.score = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def get_output_embeddings(self) -> None:  # noqa: D102
        return None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Return a score per label, and the loss; without a mask every token counts."""
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        features = self._features(input_ids, attention_mask, inputs_embeds, hidden=hidden)
        logits = self.score(self._pooled(features, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=None if hidden is None else tuple(hidden)
        )

    def _pooled(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Return one vector a sequence; a row of padding gives zeros from an encoder."""
        if mask is None:
            return features[:, -1] if self.config.causal else features.mean(1)
        if self.config.causal:
            place = torch.arange(mask.shape[1], device=mask.device)
            last = (place * mask.bool()).argmax(1)
            return features[torch.arange(len(features), device=mask.device), last]
        weight = mask.to(features.dtype)[..., None]
        return (features * weight).sum(1) / weight.sum(1).clamp(min=1)


AutoConfig.register("gramian", GramianConfig)
AutoModelForCausalLM.register(GramianConfig, GramianForCausalLM)
AutoModelForMaskedLM.register(GramianConfig, GramianForMaskedLM)
AutoModelForSequenceClassification.register(GramianConfig, GramianForSequenceClassification)
