"""Our transformers as Hugging Face models: saved, loaded, generated from and trained with their tools.

Importing this module registers them, so that AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM and
AutoModelForSequenceClassification open the folders of `gramian train` and of `save_pretrained`.
"""

from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from safetensors import SafetensorError
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
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from gramian.errors import InputError
from gramian.interop.huggingface_cache import CACHE, memory_of
from gramian.nn.transformer import Transformer, TransformerConfig
from gramian.offline import offline


@strict
class GramianConfig(PreTrainedConfig):
    """The fields of `TransformerConfig`, with what Hugging Face needs beside them."""

    model_type = "gramian"
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012  (the Trainer adds it to a list)
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
    decay: float = 0.005
    branch_gain: float = 0.1
    attention_temperature: float = 1.0
    embedding_projection: bool = False
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


class GramianPreTrainedModel(PreTrainedModel):
    """What the three models share."""

    config: GramianConfig
    config_class = GramianConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Chain", "Residual"]  # noqa: RUF012  (the base class wants a list)
    _causal: bool | None = None
    """Whether the class takes decoders or encoders, or both."""

    def __init__(self, config: GramianConfig) -> None:
        if self._causal not in (None, config.causal):
            kind = "causal" if config.causal else "masked"
            raise InputError(
                f"this run was trained with the {kind} objective; open it as a {kind} language model"
            )
        super().__init__(config)
        self.transformer = Transformer(config.shape())
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as Hugging Face does, from safetensors alone, but refuse weights of another block or shape.

        Nothing is fetched where the environment says GRAMIAN_OFFLINE=1 or HF_HUB_OFFLINE=1.

        Raises: InputError naming a weight that the checkpoint lacks, does not know or has in another shape,
        and for a damaged file.
        """
        reshape = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
        if offline():
            kwargs["local_files_only"] = True
        try:
            loaded: Any = super().from_pretrained(*args, **kwargs)
        except SafetensorError as error:
            raise InputError(f"the weights in {args[0]} are damaged or cut short: {error}") from error
        model, info = loaded
        wrong = [
            *(f"lacks {name}" for name in info["missing_keys"] if name.startswith("transformer.")),
            *(f"also holds {name}" for name in info["unexpected_keys"] if name.startswith("transformer.")),
            *(f"has {name} in another shape" for name, *_ in info["mismatched_keys"] if not reshape),
        ]
        if wrong:
            raise InputError(
                f"the checkpoint {min(wrong)} ({len(wrong)} such differences): it is not of "
                f"{model.config.depth} blocks {model.config.block!r} as config.json describes them"
            )
        return (model, info) if output_loading_info else model

    def initialize_weights(self) -> None:
        """Fill what no checkpoint brought, as `gramian.nn.init.initialise_` would."""
        new = [module for module in self.modules() if not getattr(module, "_is_hf_initialized", False)]
        super().initialize_weights()  # it passes over modules without parameters of their own
        for module in new:
            parameters = list(module.parameters())
            loaded = any(getattr(parameter, "_is_hf_initialized", False) for parameter in parameters)
            special = getattr(module, "initialise_", None)
            if callable(special) and not loaded:
                device = parameters[0].device if parameters else torch.device("cpu")
                special(torch.Generator(device).manual_seed(int(torch.randint(2**31, ()))))

    def _init_weights(self, module: nn.Module) -> None:
        """Draw a linear map or an embedding; Hugging Face's guard spares what was loaded."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.transformer.config.std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize as Hugging Face does, and let the transformer's own configuration know."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.transformer.config = self.config.shape()
        return embedding

    def get_input_embeddings(self) -> nn.Module:  # noqa: D102
        return self.transformer.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:  # noqa: D102
        self.transformer.add_module("embedding", value)

    def get_output_embeddings(self) -> nn.Module | None:  # noqa: D102
        head = self.transformer.get_submodule("head")
        return None if isinstance(head, nn.Identity) else head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:  # noqa: D102
        self.transformer.add_module("head", new_embeddings)

    def _features(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        output_hidden_states: bool | None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Return what the head reads and, if wanted, the stream entering each block and the final norm."""
        if input_ids is None and inputs_embeds is not None:
            input_ids = inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.long)
        elif input_ids is None or inputs_embeds is not None:
            raise InputError("give either input_ids or inputs_embeds, not both or neither")
        documents = None if documents is None else documents.expand_as(input_ids)
        if documents is not None and cache is not None:
            raise InputError("packed documents take no cache; pass use_cache=False")
        past = None if cache is None else memory_of(cache, self.config.depth)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden: list[Tensor] = []
        read = (*self.transformer.blocks, self.transformer.norm) if output_hidden_states else ()
        handles = [part.register_forward_pre_hook(lambda _, args: hidden.append(args[0])) for part in read]
        try:
            features = self.transformer.features(input_ids, attention_mask, documents, past, inputs_embeds)
        finally:
            for handle in handles:
                handle.remove()
        return features, tuple(hidden) if output_hidden_states else None


def _documents(position_ids: Tensor | None, mask: Tensor | None, before: int = 0) -> Tensor | None:
    """Return the number of each token's packed document; None where there are no several of them.

    As in Hugging Face's own models, positions tell only where no mask is given.
    """
    if position_ids is None or mask is not None:
        return None
    count = torch.arange(before, before + position_ids.shape[1], device=position_ids.device)
    if bool((position_ids == count).all()):
        return None
    begins, goes_on = position_ids == 0, position_ids[:, 1:] == position_ids[:, :-1] + 1
    if before or not bool(begins[:, 0].all() and (begins[:, 1:] | goes_on).all()):
        raise InputError("position_ids must count on, or begin again at 0 with every packed document")
    return begins.cumsum(-1)


class GramianForCausalLM(GramianPreTrainedModel, GenerationMixin):
    """A decoder that predicts the next token, and generates."""

    _tied_weights_keys = {"transformer.head.weight": "transformer.embedding.weight"}  # noqa: RUF012
    _causal = True

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, the loss of predicting each next label, and the cache.

        The cache, by either of its names, carries no gradient, so that it is made by default only where
        gradients are off. Without a mask, position_ids that begin again at 0 mark packed documents, which
        take no cache.
        """
        cache = past_key_values if cache is None else cache
        before = 0 if cache is None else cache.get_seq_length()
        documents = _documents(position_ids, attention_mask, before)
        if use_cache is None:
            use_cache = self.config.use_cache and documents is None and not torch.is_grad_enabled()
        if use_cache and cache is None:
            cache = DynamicCache()
        features, hidden = self._features(
            input_ids, attention_mask, inputs_embeds, output_hidden_states, documents, cache
        )
        logits = self.transformer.head(features[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocabulary, **kwargs)
        kept: dict[str, Any] = {CACHE: cache}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=hidden, **kept)


class GramianForMaskedLM(GramianPreTrainedModel):
    """An encoder that predicts masked tokens."""

    _tied_weights_keys = {"transformer.head.weight": "transformer.embedding.weight"}  # noqa: RUF012
    _causal = False

    @can_return_tuple
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
        documents = _documents(position_ids, attention_mask)
        features, hidden = self._features(
            input_ids, attention_mask, inputs_embeds, output_hidden_states, documents
        )
        logits = self.transformer.head(features)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocabulary, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=hidden)


class GramianForSequenceClassification(GramianPreTrainedModel):
    """A transformer whose pooled features a linear map turns into labels.

    An encoder's features are averaged over the real tokens; a decoder's are those of the last real token.
    """

    _keys_to_ignore_on_load_unexpected = [r"transformer\.head\.weight"]  # noqa: RUF012
    accepts_loss_kwargs = False
    """The loss is a mean over the batch, which the Trainer is to divide when it accumulates batches."""

    def __init__(self, config: GramianConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 2  # Hugging Face's default
        self.transformer.add_module("head", nn.Identity())
        self.score = nn.Linear(config.width, self.num_labels)
        self.post_init()  # of what is new

    @can_return_tuple
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
        features, hidden = self._features(input_ids, attention_mask, inputs_embeds, output_hidden_states)
        logits = self.score(self._pooled(features, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden)

    def _pooled(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Return one vector a sequence; a row of padding gives zeros from an encoder."""
        if mask is None:
            return features[:, -1] if self.config.causal else features.mean(1)
        if self.config.causal:
            place = torch.arange(mask.shape[1], device=mask.device)
            return features[torch.arange(len(features), device=mask.device), (place * mask.bool()).argmax(1)]
        weight = mask.to(features.dtype)[..., None]
        return (features * weight).sum(1) / weight.sum(1).clamp(min=1)


AutoConfig.register("gramian", GramianConfig)
AutoModelForCausalLM.register(GramianConfig, GramianForCausalLM)
AutoModelForMaskedLM.register(GramianConfig, GramianForMaskedLM)
AutoModelForSequenceClassification.register(GramianConfig, GramianForSequenceClassification)
