"""Text from a trained decoder, continued from a prompt."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from gramian.errors import InputError
from gramian.memory import check_memory
from gramian.tasks.saved_model import open_saved, shape_of, tokenizer_of, trained_model


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue a prompt with a run's newest weights."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of `gramian train` (or a block's folder of `gramian compare`)."""
    prompt: str = ""
    """Text to continue; a new document when empty."""
    tokens: int = 100
    """New tokens at most; fewer when the document ends."""
    samples: int = 1
    """Continuations."""
    temperature: float = 1.0
    """Divides the logits before drawing; 0 takes the likeliest token each time."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that make up this probability."""
    beams: int = 1
    """Beams of a beam search; above 1 nothing is drawn."""
    seed: int = 0
    """Seed of what is drawn."""

    def check(self) -> None:
        """Raise InputError naming the first setting that cannot be used."""
        for name in ("tokens", "samples", "beams"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperature >= 0:
            raise InputError(f"temperature cannot be negative, got {self.temperature:g}")
        if self.top_k < 0:
            raise InputError(f"top_k cannot be negative (0 for all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must lie in (0, 1], got {self.top_p:g}")
        if self.seed < 0:
            raise InputError(f"seed cannot be negative, got {self.seed}")
        if self.samples > 1 and self.beams == 1 and self.temperature == 0:
            raise InputError("at temperature 0 all samples are the same; ask for one, or for beams")
        if self.beams > 1 and self.samples > self.beams:
            raise InputError(f"a search with {self.beams} beams gives at most as many samples")


def generate(config: GenerateConfig) -> list[str]:
    """Return the continuations of a prompt, without the prompt.

    Raises: InputError for settings that cannot be used, a run of the masked objective, and a prompt that
    leaves no room in the context.
    """
    from gramian.interop.huggingface import GramianConfig, GramianForCausalLM

    config.check()
    run = open_saved(config.run)
    shape, tokenizer = shape_of(run), tokenizer_of(run)
    if not shape.causal:
        raise InputError(f"the run {run.folder} predicts hidden tokens; only a causal run generates text")
    prompt = tokenizer.encode(config.prompt).ids or [0]
    if len(prompt) + config.tokens > shape.context:
        raise InputError(
            f"the prompt's {len(prompt)} tokens and {config.tokens} new ones exceed the run's context of "
            f"{shape.context}"
        )
    rows, length = max(config.samples, config.beams), len(prompt) + config.tokens
    remembered = 2 * shape.depth * length * shape.width * (shape.key_heads or shape.heads) // shape.heads
    check_memory(4 * rows * (shape.vocabulary + remembered), f"{rows:,} texts of {length:,} tokens at once")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.tensor([prompt], device=device)
    drawing = {"do_sample": False}
    if config.beams == 1 and config.temperature > 0:
        drawing = {
            "do_sample": True,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
        }
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices):  # torch's own stream, from which `generate` draws, is put back
        model: Any = GramianForCausalLM(GramianConfig(**asdict(shape)))
        model.transformer = trained_model(run)
        model.eval().to(device)
        torch.manual_seed(config.seed)
        found = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=config.tokens,
            num_beams=config.beams,
            num_return_sequences=config.samples,
            **drawing,
        )
    return [tokenizer.decode(row[len(prompt) :].tolist()) for row in found]
