"""ADMC's numbers in one place: the defaults are §4.2 of the paper."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from modafill.diffusion import SOLVERS
from modafill.models.config import PRECISIONS, ModelConfig

CONDITIONINGS = ("replace", "clean")
INITS = ("unit", "scaled")
ENCODERS = ("auto", "lstm", "textcnn", "mlp")


@dataclass(frozen=True)
class ADMCConfig(ModelConfig):
    """Every number of ADMC. Fields without a source in the paper say whose they are.

    Attributes:
        width: output of each encoder, 256 (§4.2).
        encoders: per modality ``"lstm"``, ``"textcnn"`` or ``"mlp"``; ``"auto"`` (also for those not named) takes an
            MLP for one vector per sample, TextCNN for a sequence named ``text``, an LSTM for other sequences (§4.1).
        textcnn_kernels, textcnn_filters, textcnn_dropout: 3, 4, 5 × 128 filters, 0.5 (MMIN, whose features ADMC uses).
        mlp_hidden: hidden width of the MLP encoder (own choice: the paper has sequences only).
        classifier_hidden: hidden width of the 2-layer classifiers, 128 (§4.2).
        encoder_dropout: before each classifier layer, 0.3 (MMIN).
        joint_encoders: train the encoders together with a fusion network instead of one by one ("w/o ITFN").
        adn_layers, adn_heads, adn_feedforward: 4, 8, 1024 (§4.2), read as feed-forward width of a pre-norm encoder.
        adn_width: width inside ADN; None means ``width``.
        diffusion_steps, beta_start, beta_end: 1000, 3e-4, 0.06 (§4.2).
        conditioning: ``"replace"`` (the paper: ε-prediction, observed tokens re-noised at every step) or ``"clean"``
            (v-prediction, observed tokens enter undisturbed, the loss is on the missing ones).
        start_step: n of ``"replace"``, 50 (§5.5; 30 and 80 in Table 4).
        init: first value of missing tokens in ``"replace"``: ``"unit"`` (paper) or ``"scaled"``.
        min_alpha_bar: ``"clean"`` uses steps up to the one with this ᾱ; beyond it the schedule holds no signal.
        sampling_steps, solver: network evaluations of ``"clean"``, and by which of
            :data:`modafill.diffusion.SOLVERS`. 6 of DPM-Solver++(2M) recognise as well as 50 of DDIM on real
            data, with 1 % more CRPS (docs/results.md, "Fewer evaluations").
        condition_noise: standard deviation of noise on the observed tokens while ``"clean"`` trains, in units of theirs
            (conditioning augmentation, Ho et al. 2022, JMLR 23:47). It keeps the network from trusting what holds for
            training embeddings only, as a ridge penalty does; sampling reads the observed tokens as they are.
        ema_decay: ``"clean"`` samples from an exponential moving average of the weights; 0 turns it off.
        latent_scale: standard deviation of standardised tokens (start_step and scale are coupled in ``"replace"``).
        fusion_layers, fusion_heads, fusion_feedforward, fusion_dropout: 2, 4, 1024, 0.3 (§4.2).
        learning_rate: Adam, 1e-4 (§4.2).
        batch_size, encoder_epochs, adn_epochs, fusion_epochs: 128 and epochs (MMIN's batch; epochs own choice).
        patience: epochs without a lower validation loss before an encoder or a fusion network stops.
        precision: of products while it trains, ``"float32"`` or ``"bfloat16"`` (:class:`torch.autocast`); own choice.
    """

    width: int = 256
    encoders: dict[str, str] = field(default_factory=dict)
    textcnn_kernels: tuple[int, ...] = (3, 4, 5)
    textcnn_filters: int = 128
    textcnn_dropout: float = 0.5
    mlp_hidden: int = 256
    classifier_hidden: int = 128
    encoder_dropout: float = 0.3
    joint_encoders: bool = False
    adn_layers: int = 4
    adn_heads: int = 8
    adn_feedforward: int = 1024
    adn_width: int | None = None
    diffusion_steps: int = 1000
    beta_start: float = 3e-4
    beta_end: float = 0.06
    conditioning: str = "replace"
    start_step: int = 50
    init: str = "unit"
    min_alpha_bar: float = 1e-4
    sampling_steps: int = 6
    solver: str = "dpm++"
    condition_noise: float = 0.0
    ema_decay: float = 0.995
    latent_scale: float = 1.0
    fusion_layers: int = 2
    fusion_heads: int = 4
    fusion_feedforward: int = 1024
    fusion_dropout: float = 0.3
    learning_rate: float = 1e-4
    batch_size: int = 128
    encoder_epochs: int = 60
    adn_epochs: int = 200
    fusion_epochs: int = 60
    patience: int = 10
    precision: str = "float32"

    CHOICES: ClassVar = {"conditioning": CONDITIONINGS, "init": INITS, "solver": SOLVERS, "precision": PRECISIONS}
    RANGES: ClassVar = {
        "textcnn_dropout": (0.0, 0.99),
        "encoder_dropout": (0.0, 0.99),
        "fusion_dropout": (0.0, 0.99),
        "min_alpha_bar": (1e-9, 0.99),
        "ema_decay": (0.0, 0.999999),
        "condition_noise": (0.0, 100.0),
        "latent_scale": (1e-6, 1e6),
        "learning_rate": (1e-9, 10.0),
    }
    PRESETS: ClassVar = {
        "paper": {},
        "small": {
            "width": 64,
            "textcnn_filters": 64,
            "mlp_hidden": 128,
            "encoder_dropout": 0.5,
            "adn_width": 96,
            "adn_layers": 2,
            "adn_heads": 4,
            "adn_feedforward": 192,
            "condition_noise": 0.5,
            "fusion_feedforward": 256,
            "learning_rate": 1e-3,
            "encoder_epochs": 30,
            "adn_epochs": 60,
            "fusion_epochs": 20,
            "patience": 5,
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, encoder in self.encoders.items():
            if encoder not in ENCODERS:
                raise ValueError(f"encoders[{name!r}]: got {encoder!r}, expected one of {', '.join(ENCODERS)}")
        for width, heads in ((self.adn_width or self.width, self.adn_heads), (self.width, self.fusion_heads)):
            if width % heads:
                raise ValueError(f"heads: got {heads}, expected a divisor of the width {width}")
        schedule = self.schedule()
        schedule.check_step("start_step", self.start_step)
        last = schedule.last_step(self.min_alpha_bar)
        if self.conditioning == "clean" and self.sampling_steps > last:
            raise ValueError(f"sampling_steps: got {self.sampling_steps}, expected at most {last}, the steps in use")
