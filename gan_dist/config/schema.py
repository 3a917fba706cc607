"""The configuration of a run: YAML plus `section.key=value`, validated into documented, frozen models.

Every key is declared and explained here and nowhere else. Defaults are the DCGAN paper's (Radford et al. 2016) unless a
key says otherwise; configs/paintings64.yaml spells out the thesis' recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from gan_dist.config.base import (
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    read_yaml,
    validate,
    with_overrides,
)
from gan_dist.utils.files import expand_source
from gan_dist.utils.system import own_files

RESOLUTIONS = (32, 64, 128, 256)
LossName = Literal["minimax", "non_saturating", "least_squares", "hinge", "wasserstein", "relativistic"]
"""The losses, which model/losses.py computes."""
WITH_GENERATOR_TARGET: tuple[LossName, ...] = ("non_saturating", "least_squares")
WITH_REAL_TARGET: tuple[LossName, ...] = ("minimax", *WITH_GENERATOR_TARGET)
"""Those that have a target on generated, and on real images."""
WITH_SIGN: tuple[LossName, ...] = ("minimax", "non_saturating", "hinge")
"""Those with which a logit above 0 means: real."""
Upsample = Literal["transposed", "nearest"]
DNorm = Literal["batch", "none", "spectral"]
Blocks = Literal["plain", "residual"]
Init = Literal["dcgan", "he"]
ClassSource = Literal["none", "dataset"]
"""Choices of the networks, which model/networks.py builds."""
PenaltyMethod = Literal["finite", "exact"]
"""How model/penalty.py takes the gradient of D."""

Target = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class AugmentConfig(Section):
    colour: bool = False
    """Change brightness, saturation and contrast, of real and generated images alike (Zhao et al. 2020)."""
    translation: bool = False
    """Move images by up to an eighth of their side."""
    cutout: bool = False
    """Cut a square of half their side out of images."""
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """That of each change for an image; with a target, the most that it becomes."""
    target: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Adapt the probability, from 0 on, so that the mean sign of D's logits of real images is this: 0.6 (Karras et al.
    2020). null keeps it."""

    @model_validator(mode="after")
    def _target_has_an_effect(self) -> AugmentConfig:
        if self.target is not None and not (self.colour or self.translation or self.cutout):
            raise ValueError(
                f"data.augment.target: expected a change whose probability it moves, found {self.target} and none; "
                "set data.augment.translation=true, or data.augment.target=null"
            )
        return self


class DataConfig(Section):
    shards: str
    """The dataset: a directory that `gan-dist prepare` wrote, or the address of one, which is then staged: http(s)://,
    s3://, gs://, `pipe:COMMAND` with {} for a file's name, file:// for a directory on a slow disk."""
    placement: Literal["auto", "device", "memory", "windowed"] = "auto"
    """Where samples wait: in GPU memory, memory-mapped on the host, or a moving window of shards. auto: the first of
    these that fits; windows for a remote set where window_shards is set."""
    window_shards: NonNegative = 0
    """Shuffle shards, then samples within windows of this many shards; 0 shuffles the whole set."""
    cache_dir: str | None = None
    """Where addresses are staged, once a node, and stay. null: $TMPDIR or /tmp, /dev/shm or ~/.cache, whichever first
    has room, until the last job that uses them ends."""
    x_flip: bool = False
    """Mirror each real image with probability one half."""
    augment: AugmentConfig = AugmentConfig()
    """What D sees of real and generated images is changed at random, so that it cannot learn a small set by heart."""


class ModelConfig(Section):
    resolution: int = 64
    """Side of the square images in pixels: 32, 64, 128 or 256; must be the dataset's."""
    latent_dim: Positive = 100
    """Numbers in a latent, drawn from N(0, 1)."""
    g_channels: Positive = 64
    """Width of the generator's last hidden layer; earlier layers double it down to 4x4 pixels."""
    d_channels: Positive = 64
    """Width of the discriminator's first layer; later layers double it down to 4x4 pixels."""
    max_channels: Positive | None = None
    """What no layer of either network is wider than: 512 in StyleGAN, fmaps_max. null leaves the doubling alone, which
    at 128 and 256 pixels gives 4 and 16 times the weights of 64."""
    leaky_slope: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Slope of LeakyReLU below zero."""
    upsample: Upsample = "transposed"
    """How G doubles its side. transposed: 4x4 transposed convolutions. nearest: nearest neighbours and a 3x3
    convolution, which leave no checkerboard (Odena et al. 2016)."""
    d_norm: DNorm = "batch"
    """What D's hidden layers are normalised by. none and spectral (Miyato et al. 2018) give its layers biases."""
    blocks: Blocks = "plain"
    """residual: each hidden resolution of both networks has one more 3x3 convolution, beside a way past it. Nearly
    three times the work."""
    minibatch_std: bool = False
    """D is also told how much the images of the whole batch differ (Karras et al. 2018), against collapse."""
    classes: ClassSource = "none"
    """dataset: both networks are told the class of each image, as the dataset's labels have it, and images of a class
    can be asked for: G gets it beside the latents, D by a projection (Miyato and Koyama 2018). A tenth of the labels is
    dropped at random. none: labels play no part."""
    classes_min_images: NonNegative = 100
    """With classes: smaller ones count as unlabelled."""
    init: Init = "dcgan"
    """dcgan: weights start as N(0, init_std^2), batch-norm weights as N(1, init_std^2). he: weights start as
    N(0, gain^2 / fan-in), batch-norm weights as 1 (He et al. 2015). Biases start as 0."""
    init_std: PositiveFloat = 0.02
    """The deviation of model.init=dcgan."""

    @model_validator(mode="after")
    def _resolution_is_built_for(self) -> ModelConfig:
        if self.resolution not in RESOLUTIONS:
            raise ValueError(f"model.resolution: expected a power of two from 32 to 256, found {self.resolution}")
        return self


class GradientPenaltyConfig(Section):
    weight: NonNegativeFloat = 0.0
    """What D's loss adds: weight * E |grad D(x)|^2, so half of R1's gamma (Mescheder et al. 2018); 0 adds nothing. It
    grows with the image: StyleGAN2-ADA starts from 0.0001 resolution^2 / batch (Karras et al. 2020)."""
    sigma: PositiveFloat = 0.1
    """Deviation of the noise between whose two ends finite differences are taken; pixels lie in [-1, 1]."""
    on: Literal["real", "both"] = "real"
    """The images at which D is to be smooth: real ones (R1), or generated ones as well (R1 and R2)."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of the batch that is penalised: 1, 1/2, 1/3, ... of it, at regular places."""
    method: PenaltyMethod = "finite"
    """finite: (D(x + sigma eps) - D(x))^2 / sigma^2, a pass like any other. exact: the gradient itself, differentiated
    once more; slow, and for train.runner=eager alone."""

    @property
    def every(self) -> int:
        """Places from one penalised image to the next."""
        return round(1 / self.share)

    @model_validator(mode="after")
    def _share_is_regular(self) -> GradientPenaltyConfig:
        if abs(self.share * self.every - 1) > 0.01:
            raise ValueError(
                f"loss.gradient_penalty.share: expected 1, 0.5, 0.333, 0.25, ... (1 over a whole number), "
                f"found {self.share}"
            )
        return self


class LossConfig(Section):
    name: LossName = "non_saturating"
    """The game; logits are D's output. minimax: G minimises E log(1 - D(G(z))); non_saturating: it maximises
    E log D(G(z)) (Goodfellow 2014, eq. 1). least_squares (Mao 2017), hinge (Lim and Ye 2017), wasserstein (Arjovsky
    2017). relativistic: D tells which of a pair is the real one (Jolicoeur-Martineau 2018)."""
    real_target: Target = 1.0
    """D's target on real images (minimax, non_saturating, least_squares); below 1 is one-sided label smoothing."""
    generator_target: Target | None = None
    """G's target on its own images (non_saturating, least_squares); null means 1."""
    gradient_penalty: GradientPenaltyConfig = GradientPenaltyConfig()
    """A penalty on steep discriminators, instead of batch norm in them."""

    @model_validator(mode="after")
    def _targets_fit_the_loss(self) -> LossConfig:
        if self.generator_target is not None and self.name not in WITH_GENERATOR_TARGET:
            raise ValueError(
                f"loss.generator_target: {self.name} takes no generator target, found {self.generator_target}; "
                "set it to null, or loss.name=non_saturating"
            )
        if self.real_target != 1 and self.name not in WITH_REAL_TARGET:
            raise ValueError(
                f"loss.real_target: {self.name} takes no target, found {self.real_target}; "
                "set it to 1, or loss.name=non_saturating"
            )
        return self


class OptimConfig(Section):
    g_lr: PositiveFloat = 2e-4
    """Adam's learning rate for the generator. Never scaled by batch or world size."""
    d_lr: PositiveFloat = 2e-4
    """Adam's learning rate for the discriminator."""
    warmup_images: NonNegative = 0
    """Images over which both rates rise from 0; 0 starts with the whole rates."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """How both rates fall, from the start to decay_images; after that they stay at decay_to."""
    decay_images: NonNegative = 0
    """Images seen at which the fall ends. Not a share of the run: more epochs do not change what has been."""
    decay_to: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the rates that is left then."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.5, 0.999)
    """Adam's decay rates for the first and second moments."""
    g_betas: Annotated[tuple[Beta, Beta] | None, Field(strict=False)] = None
    """The generator's own; null means betas."""
    d_betas: Annotated[tuple[Beta, Beta] | None, Field(strict=False)] = None
    """The discriminator's own; null means betas."""
    beta2_to: Beta | None = None
    """What the second decay rate of both networks moves to, from that of betas; null leaves it (R3GAN: 0.9 to 0.99)."""
    beta2_images: NonNegative = 0
    """Images over which it moves, linearly."""
    d_steps: Positive = 1
    """Discriminator updates for each generator update (Goodfellow 2014, algorithm 1's k)."""

    @model_validator(mode="after")
    def _a_ramp_has_an_end(self) -> OptimConfig:
        if (self.beta2_to is None) != (self.beta2_images == 0):
            raise ValueError(
                "optim.beta2_images: expected 1 or more with an optim.beta2_to, and 0 with null, found "
                f"{self.beta2_images} with {'null' if self.beta2_to is None else self.beta2_to}"
            )
        return self

    @model_validator(mode="after")
    def _a_fall_has_an_end(self) -> OptimConfig:
        if (self.decay == "none") != (self.decay_images == 0):
            raise ValueError(
                f"optim.decay_images: expected 1 or more with optim.decay=linear or cosine, and 0 with none, found "
                f"{self.decay_images} with {self.decay}"
            )
        return self


class TrainConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    epochs: PositiveFloat = 30.0
    """Passes over the dataset, counted in images that D has seen."""
    global_batch: Positive = 128
    """Real images in one D update, over all ranks together."""
    precision: Literal["auto", "bf16", "tf32", "fp32", "fp64"] = "auto"
    """auto: bf16 autocast where the device has it natively, else fp32. Weights and statistics stay fp32."""
    runner: Literal["auto", "eager", "compiled", "captured", "captured_compiled"] = "auto"
    """How the step is executed: as written; its passes compiled; recorded as a CUDA graph; or that of compiled passes.
    auto: captured on a GPU, with NCCL where there are ranks, else eager. The console says why."""
    sync_batchnorm: bool = True
    """Normalise over the global batch. false normalises each rank's slice alone: another game, for experiments."""
    batchnorm_kernels: Literal["auto", "torch", "triton"] = "auto"
    """Who computes batch norm and the activation after it, losses and, in bf16, the layers between images and maps.
    auto: Triton's fused kernels on a GPU where a check at the start finds them right, else torch's."""
    ema_half_life_images: NonNegative = 0
    """Images after which an averaged generator has forgotten half; 0 keeps none."""
    ema_statistics: Literal["averaged", "standing"] = "averaged"
    """Batch norm's statistics in the averaged generator. averaged: they are averaged too. standing: measured on the
    averaged weights, over 1,024 fixed latents, whenever they draw (Brock et al. 2019)."""
    threads: Positive | None = None
    """CPU threads of torch in each rank; null keeps torch's choice: 1 under torchrun, slurm.cpus_per_task in a job.
    Changes bits on CPU."""
    deterministic: bool | Literal["auto"] = "auto"
    """Ask torch for deterministic kernels: then the same start gives the same bits on a GPU too, at some cost. auto: on
    a GPU yes; on a CPU no, where the bits are the same without."""
    stop_after_minutes: PositiveFloat | None = None
    """Save and end with status 75 after this long; null runs to the end."""

    @model_validator(mode="after")
    def _statistics_have_an_average(self) -> TrainConfig:
        if self.ema_statistics == "standing" and self.ema_half_life_images == 0:
            raise ValueError(
                "train.ema_statistics: standing statistics are the averaged generator's, found no average; set "
                "train.ema_half_life_images=10000, or train.ema_statistics=averaged"
            )
        return self


class LogConfig(Section):
    scalars_every: Positive = 50
    """Steps between points in TensorBoard, metrics.jsonl and the console."""
    samples_every: Positive = 200
    """Steps between grids of the fixed latents; one more is drawn at the end."""
    grid: Annotated[int, Field(ge=1, le=1024)] = 64
    """Images in a grid."""


class CheckpointConfig(Section):
    every_steps: NonNegative = 1000
    """Steps between checkpoints; 0 leaves it to minutes, epochs and the end."""
    every_minutes: NonNegativeFloat = 15.0
    """Minutes between checkpoints; 0 leaves it to steps, epochs and the end."""
    keep: Positive = 3
    """Newest checkpoints to keep."""
    keep_epochs: bool = False
    """Save at each epoch's end and keep those for good."""


FEWEST_SAMPLES, FEWEST_FOR_ENCODER = 100, 256
"""Samples below which figures say nothing about a distribution; and below which the covariance of an encoder's 128
features is an accident of the sample."""


class EvaluateConfig(Section):
    every_steps: NonNegative = 0
    """Steps between evaluations during training; 0 evaluates never."""
    samples: Positive = 10000
    """Generated and real images that an evaluation compares."""
    encoder: str = "auto"
    """A file that `gan-dist encoder` wrote: adds the feature distance. auto: the one in the dataset's folder, where
    there is one; none: go without."""
    held_out: str | None = None
    """A dataset that is not trained on: does the discriminator know its images as it knows the others?"""


class DistConfig(Section):
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: nccl on GPUs, gloo elsewhere."""
    init_timeout_s: PositiveFloat = 600.0
    """Seconds to wait for all ranks to appear."""
    timeout_s: PositiveFloat = 300.0
    """Seconds after which a collective that does not finish means that a rank is lost."""


class Config(Section):
    seed: NonNegative = 0
    """Keys the initial weights, the order of images and every latent."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    dist: DistConfig = DistConfig()

    @model_validator(mode="after")
    def _placement_has_its_window(self) -> Config:
        if self.data.placement == "windowed" and self.data.window_shards == 0:
            raise ValueError("data.window_shards: placement windowed needs a window of 1 shard or more, found 0")
        if self.data.placement == "windowed" and self.evaluate.every_steps:
            raise ValueError(
                "evaluate.every_steps: a windowed placement keeps only a part of the dataset here, expected 0, "
                f"found {self.evaluate.every_steps}; `gan-dist evaluate RUN --all-checkpoints` evaluates afterwards"
            )
        return self

    @model_validator(mode="after")
    def _target_fits_the_loss(self) -> Config:
        if self.data.augment.target is not None and self.loss.name not in WITH_SIGN:
            raise ValueError(
                f"data.augment.target: the sign of a logit means nothing with loss.name={self.loss.name}, found "
                f"{self.data.augment.target}; set it to null, or choose {', '.join(WITH_SIGN)}"
            )
        return self

    @model_validator(mode="after")
    def _penalty_fits_the_rest(self) -> Config:
        penalty = self.loss.gradient_penalty
        if penalty.weight and self.model.d_norm == "batch":
            raise ValueError(
                "loss.gradient_penalty.weight: batch norm makes D's judgement of an image depend on the others, so it "
                f"has no gradient penalty, found {penalty.weight}; set model.d_norm=none or spectral"
            )
        if penalty.weight and self.model.minibatch_std:
            raise ValueError(
                "model.minibatch_std: makes D's judgement of an image depend on the others, which then has no gradient "
                "penalty, found true; set it to false, or loss.gradient_penalty.weight=0"
            )
        if penalty.weight and penalty.method == "exact" and self.train.runner != "eager":
            raise ValueError(
                "loss.gradient_penalty.method: exact differentiates twice, which only train.runner=eager does, found "
                f"{self.train.runner}; set it, or loss.gradient_penalty.method=finite"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Returns the whole configuration as plain YAML values."""
        return self.model_dump(mode="json")


def load_config(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Config:
    """Returns the validated configuration of a YAML file or a plain mapping, with `section.key=value` words applied.

    Paths come out absolute. Raises UserError with one line naming the key and what to do.
    """
    if isinstance(source, Config):
        values, origin = source.to_dict(), "configuration"
    elif isinstance(source, Mapping):
        values, origin = {key: dict(v) if isinstance(v, Mapping) else v for key, v in source.items()}, "configuration"
    else:
        values, origin = read_yaml(Path(expand_source(str(source)))), str(source)
    values = with_overrides(Config, values, overrides)
    for head, key in (("data", "shards"), ("data", "cache_dir"), ("evaluate", "held_out"), ("evaluate", "encoder")):
        section = values.get(head)
        if isinstance(section, dict) and isinstance(section.get(key), str) and section[key] not in ("auto", "none"):
            values[head] = {**section, key: expand_source(section[key])}
    return validate(Config, values, origin, overrides)


PRESETS = ("paintings64", "paintings64-modern", "paintings128", "paintings256", "demo")


def preset(name: str) -> Config:
    """Returns a configuration that comes with gan_dist: one of PRESETS."""
    package = own_files()
    # In a wheel the presets lie inside the package; in a checkout, configs/ beside it is the one place to edit them.
    homes = (package / "configs", package.parent / "configs")
    home = next((home for home in homes if home.is_dir()), homes[0])
    return load_config(read_yaml(home / f"{name}.yaml"))


def presets() -> dict[str, dict[str, Any]]:
    """Returns the configurations that come with gan_dist by name, as plain nested values."""
    return {name: preset(name).to_dict() for name in PRESETS}


def to_yaml(config: Config) -> str:
    """Returns the configuration as YAML text that load_config reads back equal."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
