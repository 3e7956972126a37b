"""CDTP's numbers in one place: the defaults are §4.3 of the paper."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from modafill.diffusion import SOLVERS
from modafill.models.completed import ModalitySpec
from modafill.models.config import PRECISIONS, ModelConfig

COMPLETIONS = ("diffusion", "linear", "none")
TYPE_PROMPTS = ("bias", "append", "none")
PREDICTIONS = ("epsilon", "v")
TRAININGS = ("two-stage", "joint")
# Ablations: what differs from the configuration. Without their addition, signal prompts still make the type prompts.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "no-generative": {"generative_prompt": False},
    "no-signal": {"signal_prompt": False},
    "no-type": {"type_prompt": "none"},
    "append": {"type_prompt": "append"},
    "linear": {"completion": "linear"},
    "plain": {"completion": "none", "generative_prompt": False, "signal_prompt": False, "type_prompt": "none"},
}


@dataclass(frozen=True)
class SequenceSpec(ModalitySpec):
    """What CDTP must know of a modality: its feature width D and the longest sequence L; vectors have length 1."""

    sequence: bool = field(default=True, kw_only=True)
    length: int

    def __post_init__(self) -> None:
        if self.length < 1 or (self.length > 1 and not self.sequence):
            raise ValueError(
                f"length: got {self.length}, expected {'at least 1' if self.sequence else '1 for a vector'}"
            )

    def check(self, name: str, x: Tensor) -> None:
        """Raise ValueError unless ``x`` has the dimensions of the modality ``name`` and is not too long."""
        super().check(name, x)
        if self.sequence and x.shape[1] > self.length:
            raise ValueError(f"features[{name!r}]: got length {x.shape[1]}, expected at most {self.length}")


@dataclass(frozen=True)
class CDTPConfig(ModelConfig):
    """Every number of CDTP. Fields without a source in the paper say whose they are.

    Attributes:
        width: of every projected modality, 256 (§4.3).
        projection_kernel: taps of the projection, 1 ("equivalent to a linear layer", §3.2.2).
        heads, layers: 8 and 6 (§4.3), of the crossmodal encoders.
        self_layers: of the self-attention encoders; None = ``layers``, at least 3 (MulT).
        dropout: of attention, feed-forward layers and residuals, 0.1 (§4.3).
        input_dropout: of the features, 0 (MPLMM: 0.25 on text).
        causal: MulT's mask in all encoders (on by default there and in MPLMM).
        completion: ``"diffusion"`` (the paper), ``"linear"`` (MPLMM's map over channels) or ``"none"`` (missing
            modalities stay empty).
        generative_prompt, signal_prompt: whether they are used (§3.3.1, §3.3.2).
        type_prompt: ``"bias"`` (the paper: added to the logits), ``"append"`` (MPLMM: tokens behind the sequence) or
            ``"none"`` (§3.3.3).
        prompt_length: ℓp, 16 (MPLMM).
        condition_width: channels of the condition encoder; None = ``width``.
        condition_kernels: taps of its two convolutions, 3 and 1 (the authors' code).
        unet_channels: of each level of the U-Net, 128, 256, 512 (the authors' code).
        unet_blocks: residual blocks per level, 2 (the authors' code).
        shared_denoiser: one network for all pairs, told which by an embedding, instead of one for each.
        diffusion_steps, beta_start, beta_end: 1000, 1e-4, 0.02 (the authors' code).
        prediction: ``"epsilon"`` (eq. 5) or ``"v"`` (Salimans & Ho 2022), which few sampling steps need less luck with.
        min_alpha_bar: steps up to the one with this ᾱ are used; beyond it there is no signal.
        sampling_steps: evaluations of the DDIM sampler (eq. 8–9), 20 (own choice: on a toy with a known answer the mean
            then errs by less than 0.15 of the noise's deviation, with either prediction).
        solver: which of :data:`modafill.diffusion.SOLVERS`.
        eta: of ``"ddim"``: 0 deterministic, 1 ancestral.
        drop_rate: p_drop, how often a training sample loses modalities, 0.2 (§4.3).
        diffusion_weight: λ of the diffusion loss beside the task's in joint training (the paper names none).
        training: ``"two-stage"`` (diffusion before fusion, §3; on the projections of a backbone that is trained before
            both, because a denoiser needs a fixed target) or ``"joint"`` (after that backbone, all at once).
        ema_decay: of the denoisers' averaged weights in the first stage; 0 turns it off (own choice).
        learning_rate, diffusion_learning_rate: Adam, 1e-4 (§4.3); the latter of the denoisers' own stage.
        batch_size, epochs: 32 and 50 (§4.3); the backbone and each variant take up to so many epochs.
        diffusion_epochs: of the first stage (own choice).
        patience: epochs without a lower validation loss before the backbone or a variant stops.
        precision: of products while it trains, ``"float32"`` or ``"bfloat16"`` (:class:`torch.autocast`); own choice.
    """

    width: int = 256
    projection_kernel: int = 1
    heads: int = 8
    layers: int = 6
    self_layers: int | None = None
    dropout: float = 0.1
    input_dropout: float = 0.0
    causal: bool = True
    completion: str = "diffusion"
    generative_prompt: bool = True
    signal_prompt: bool = True
    type_prompt: str = "bias"
    prompt_length: int = 16
    condition_width: int | None = None
    condition_kernels: tuple[int, int] = (3, 1)
    unet_channels: tuple[int, ...] = (128, 256, 512)
    unet_blocks: int = 2
    shared_denoiser: bool = False
    diffusion_steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction: str = "epsilon"
    min_alpha_bar: float = 1e-3
    sampling_steps: int = 20
    solver: str = "ddim"
    eta: float = 0.0
    drop_rate: float = 0.2
    diffusion_weight: float = 1.0
    training: str = "two-stage"
    ema_decay: float = 0.995
    learning_rate: float = 1e-4
    diffusion_learning_rate: float = 1e-4
    batch_size: int = 32
    epochs: int = 50
    diffusion_epochs: int = 50
    patience: int = 10
    precision: str = "float32"

    CHOICES: ClassVar = {
        "solver": SOLVERS,
        "completion": COMPLETIONS,
        "type_prompt": TYPE_PROMPTS,
        "prediction": PREDICTIONS,
        "training": TRAININGS,
        "precision": PRECISIONS,
    }
    RANGES: ClassVar = {
        "dropout": (0.0, 0.99),
        "input_dropout": (0.0, 0.99),
        "min_alpha_bar": (1e-9, 0.99),
        "eta": (0.0, 1.0),
        "drop_rate": (0.0, 1.0),
        "diffusion_weight": (0.0, 1e6),
        "ema_decay": (0.0, 0.999999),
        "learning_rate": (1e-9, 10.0),
        "diffusion_learning_rate": (1e-9, 10.0),
    }
    PRESETS: ClassVar = {
        "paper": {},
        "small": {
            "width": 32,
            "heads": 4,
            "layers": 1,
            "self_layers": 1,
            "prompt_length": 8,
            "unet_channels": (32, 64),
            "unet_blocks": 1,
            "prediction": "v",
            "sampling_steps": 5,
            "drop_rate": 0.8,
            "learning_rate": 3e-4,
            "diffusion_learning_rate": 2e-3,
            "epochs": 20,
            "diffusion_epochs": 20,
            "patience": 4,
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, taps in (
            ("projection_kernel", self.projection_kernel),
            *(("condition_kernels", k) for k in self.condition_kernels),
        ):
            if type(taps) is not int or taps not in (1, 3, 5, 7):
                raise ValueError(f"{name}: got {taps!r}, expected 1, 3, 5 or 7")
        if len(self.condition_kernels) != 2:
            raise ValueError(f"condition_kernels: got {list(self.condition_kernels)}, expected two")
        for name, width in (("width", self.width), ("unet_channels", self.unet_channels[-1])):
            if width % self.heads or width // self.heads % 4 or width // self.heads > 128:
                raise ValueError(
                    f"{name}: got {width} with {self.heads} heads, expected heads of a multiple of 4 wide, up to 128"
                )
        last = self.schedule().last_step(self.min_alpha_bar)
        if self.eta and self.solver != "ddim":
            raise ValueError(f"eta: got {self.eta}, expected 0 with solver {self.solver!r}")
        if self.sampling_steps > last:
            raise ValueError(f"sampling_steps: got {self.sampling_steps}, expected at most {last}, the steps in use")
