"""How a model is trained: every setting of the loop, and which of them can be used."""

from dataclasses import dataclass
from importlib.util import find_spec

from gramian.errors import InputError, MissingExtraError
from gramian.observe.recorder import MODES
from gramian.ranks import ranks
from gramian.train import optimisers
from gramian.train.processes import unequal
from gramian.train.schedule import multiplier


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained."""

    steps: int = 800
    """Optimiser steps."""
    batch: int = 4
    """Sequences an optimiser step sees, over all devices."""
    accumulation: int = 1
    """Micro-batches that a step's sequences are split into, to save memory."""
    optimiser: str = "adamw"
    """adamw, adafactor, soap, shampoo or muon; AdamW trains embeddings and vectors beside the last three."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    vector_learning_rate: float | None = None
    """Peak learning rate of what AdamW trains beside soap, shampoo or muon; the same when not given."""
    schedule: str = "linear"
    """How the learning rate falls after the warm-up: linear, cosine or constant."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; gains, norms and biases have none."""
    betas: tuple[float, float] | None = None
    """Decay rates of the two moments; each optimiser's own when not given, 0.9 and 0.99 for adamw."""
    eps: float = 1e-8
    """The term that AdamW and SOAP add to the root of the second moment."""
    clip: float = 1.0
    """Largest gradient norm; inf for no clipping."""
    precision: str = "fp32"
    """Arithmetic of the forward pass: fp32, or bf16 for autocast."""
    gradient_checkpointing: bool = False
    """Whether blocks are computed again in the backward pass, to save memory."""
    compile: bool = False
    """Compile the model with torch.compile (steps that are observed run uncompiled)."""
    device: str = "auto"
    """auto takes a GPU when there is one; cpu never does."""
    seed: int = 0
    """Seed of weights and batches."""
    evaluate_every: int = 100
    """Steps between two evaluations."""
    observe_every: int = 50
    """Steps between two observations of the insides."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints kept, newest first; 0 keeps all."""
    log_every: int = 10
    """Steps between two looks at the loss (each one waits for the device)."""
    trajectory_every: int = 0
    """Steps between two points of the recorded trajectory, of which the last step is one; 0 for none."""
    trajectory: str = "sketch"
    """What a point of the trajectory keeps: sketch, 64 KiB for any model, or exact, all weights."""
    tensorboard: bool = False
    """Also write TensorBoard files into the run folder."""

    def check(self) -> None:
        """Raise InputError (MissingExtraError) naming the first setting that cannot be used."""
        counts = ("steps", "batch", "accumulation", "evaluate_every", "observe_every", "checkpoint_every")
        for name in (*counts, "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch % self.accumulation:
            raise InputError(f"batch {self.batch} is not divisible by accumulation {self.accumulation}")
        if self.batch % (self.accumulation * ranks()):
            raise InputError(unequal(f"a batch of {self.batch}", ranks(), self.accumulation))
        for name in ("keep", "trajectory_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} cannot be negative, got {getattr(self, name)}")
        if self.trajectory not in MODES:
            raise InputError(f"unknown trajectory {self.trajectory!r}; choose sketch or exact")
        if not self.clip > 0:
            raise InputError(f"clip must be positive (inf for none), got {self.clip:g}")
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"unknown precision {self.precision!r}; choose fp32 or bf16")
        if self.device not in ("auto", "cpu"):
            raise InputError(f"unknown device {self.device!r}; choose auto or cpu")
        if self.tensorboard and find_spec("tensorboard") is None:
            raise MissingExtraError(
                'writing TensorBoard files needs tensorboard: pip install "gramian[tensorboard]"'
            )
        if self.seed < 0:
            raise InputError(f"seed cannot be negative, got {self.seed}")
        multiplier(0, self.steps, self.warmup, self.schedule)
        optimisers.check(self.optimiser, self.rates)

    @property
    def rates(self) -> optimisers.Settings:
        """What the optimiser is told."""
        return optimisers.Settings(
            self.learning_rate, self.weight_decay, self.betas, self.eps, self.vector_learning_rate
        )
