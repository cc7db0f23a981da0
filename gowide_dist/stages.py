"""What a recipe says of a stage: objective, teacher, start, optimizer and schedule. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from gowide_dist.schema import Count, Fraction, Frozen, Name, Natural, NonNegative, Positive, Real, Seed, UserPath


def _within_draws(alpha: float) -> float:
    if alpha and not 1e-3 <= alpha <= 1e3:  # beyond, images hardly mix, and draws become NaN in the end
        raise ValueError(f"should be 0, which turns it off, or from 0.001 to 1000, not '{alpha:g}'")
    return alpha


# Within these limits the loss is exact in float32. Far above, all probabilities are equal; far below, one is 1.
Temperature = Annotated[Real, Field(ge=1e-3, le=1e3)]
Decay = Annotated[Real, Field(ge=0, lt=1)]  # of an average: with 1 it would never change
Alpha = Annotated[NonNegative, AfterValidator(_within_draws)]
Reference = Annotated[str, Field(strict=True)]  # `stage` or `stage/network`
# One name or several.
Names = Annotated[tuple[Name, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), Field(min_length=1)]


class Optim(Frozen):
    """Stochastic gradient descent. `lr` is the peak of the schedule."""

    lr: Positive
    momentum: Decay = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 0.0
    decay_norms: bool = True  # whether weight decay applies to batch norms and biases too
    clip_norm: Positive | None = None  # largest norm of the gradient of all parameters together
    accumulate: Count = 1  # micro-batches of a process's local batch, one forward and backward pass each: less memory
    # decay per step of the moving average of weights that is evaluated and kept; it warms up to this
    ema: Decay | None = None

    @model_validator(mode="after")
    def _check(self) -> Optim:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum")
        return self


class Schedule(Frozen):
    """The learning rate over a stage: a linear warm-up, then a decay. `cosine` is short for `{decay: cosine}`.

    In a bottom-up imitation the schedule begins anew with each block.
    """

    decay: Literal["cosine", "linear", "step", "constant"] = "cosine"
    warmup_epochs: NonNegative = 0.0
    milestones: tuple[Positive, ...] = ()  # epochs: with decay: step, the rate is multiplied by `factor` at each
    factor: Fraction = 0.1

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        if isinstance(values, str):
            return {"decay": values}
        if isinstance(values, Mapping) and "milestones" in values and "decay" not in values:
            return {"decay": "step", **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if bool(self.milestones) != (self.decay == "step"):
            raise ValueError("decay: step and milestones need each other")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones should increase")
        return self


class File(Frozen):
    """Weights in a file: a .safetensors, or a checkpoint of PyTorch's, as torchvision, timm and others publish them."""

    file: UserPath
    classifier: Literal["file", "fresh"] = "file"  # fresh: drawn from the seed, for other classes than the file's
    prefix: str | None = None  # of the network's names, where the file holds several networks


Start = Annotated[
    Annotated[Reference, Tag("stage")] | Annotated[File, Tag("file")],
    Discriminator(lambda value: "file" if isinstance(value, File | Mapping) else "stage"),
]


class Ramp(Frozen):
    """Training images that grow, from `start_px` in `from_epoch` to `end_px`, which they first have in `until_epoch`.

    In between the side grows linearly, in steps of 32 px. Validation images always have the full resolution: with an
    `end_px` below it the network is tested on larger images than it trained on (arXiv 1906.06423).
    """

    start_px: Count
    end_px: Count | None = None  # default: the data's resolution
    from_epoch: Natural = 0
    until_epoch: Count

    def side(self, epoch: int, resolution: int) -> int:
        """Side in px of the training images of an epoch."""
        end = self.end_px or resolution
        if epoch >= self.until_epoch:
            return end
        part = max(0, epoch - self.from_epoch) / (self.until_epoch - self.from_epoch)
        return min(end, self.start_px + 32 * round((end - self.start_px) * part / 32))

    @property
    def is_constant(self) -> bool:
        return self.start_px == self.end_px

    @model_validator(mode="after")
    def _check(self) -> Ramp:
        if self.from_epoch >= self.until_epoch:
            raise ValueError(f"from_epoch ({self.from_epoch}) should be less than until_epoch ({self.until_epoch})")
        if self.end_px and self.end_px < self.start_px:
            raise ValueError(f"end_px ({self.end_px}) should not be less than start_px ({self.start_px})")
        return self


class StageBase(Frozen):
    """Settings of every stage. Each network in `train` is an instance of the stage."""

    train: Names
    init: Start | None = None  # a stage, whose weights of the same network this one starts from, or a file
    epochs: Natural  # 0 takes the weights of `init` as they are
    optim: Optim | None = None  # required unless epochs is 0
    schedule: Schedule = Schedule()
    ramp: Ramp | None = None  # progressive resizing; needs data.augment.crop
    seed: Seed | None = None  # default: the recipe's; set, several recipes of other seeds can share one teacher

    @property
    def has_stored_logits(self) -> bool:
        """Whether the teacher's outputs are read from disk, so that it does not run in a step."""
        return False

    def num_phases(self, num_blocks: int) -> int:
        """Phases of equal length, each of which trains its own subset of the parameters."""
        return 1

    @model_validator(mode="after")
    def _check_epochs(self) -> StageBase:
        if self.epochs and self.optim is None:
            raise ValueError("optim is required to train")
        if not self.epochs and self.init is None:
            raise ValueError("epochs: 0 needs init, whose weights it uses unchanged")
        return self


class LogitsStage(StageBase):
    """Settings of every stage that trains by a network's logits.

    Its training images can be mixed in pairs; with mixup and cutmix, half of the pairs each.
    """

    mixup: Alpha = 0.0  # alpha of the Beta distribution of an image's own part; 0: no mixup
    cutmix: Alpha = 0.0  # the same for CutMix, in which a box of the partner covers the rest
    # balanced: an image's cross-entropy in training is weighted by N / (K times the N_k training images of its class)
    class_weights: Literal["balanced"] | None = None
    # the network computes as its file of 8 bits will, so that it learns to; symmetric: as without zero points
    quantised: Literal[False, True, "symmetric"] = False

    @property
    def is_mixed(self) -> bool:
        return bool(self.mixup or self.cutmix)

    @model_validator(mode="after")
    def _check_quantised(self) -> LogitsStage:
        if self.quantised and not (self.epochs and self.init):
            raise ValueError("quantised: fine-tunes a network; give epochs, and init, the weights that it starts from")
        if self.quantised and self.ramp:
            raise ValueError("quantised: needs images of one size; leave ramp out")
        return self


class LabelsStage(LogitsStage):
    """Cross-entropy on the labels."""

    objective: Literal["labels"]
    label_smoothing: Fraction = 0.0


class TaughtStage(StageBase):
    """Settings of every stage with a teacher."""

    teacher: Reference
    # teacher: its weights, where name and shape are the same; pruned: also its strongest channels inside the units
    start: Literal["teacher", "pruned", "fresh"] = "fresh"

    @model_validator(mode="after")
    def _check_start(self) -> TaughtStage:
        if self.start != "fresh" and self.init is not None:
            both = f"start: {self.start} and init"
            raise ValueError(f"{both} both say which weights the stage starts from; keep one of them")
        return self


class Phase(NamedTuple):
    """Blocks of the student that a phase of an imitation runs and trains; the stem belongs to block 0."""

    runs: range  # forward pass: lower blocks too, unless the teacher's outputs replace theirs
    trains: range  # backward pass
    targets: range  # their outputs are compared with the teacher's

    @property
    def has_frozen_prefix(self) -> bool:
        """Whether blocks run below those that train."""
        return self.runs.start < self.trains.start


class BlocksStage(TaughtStage):
    """Imitation of the teacher's block outputs: mean squared errors, one for each block.

    The options are what the paper leaves open; see docs/method.md.
    """

    objective: Literal["blocks"]
    order: Literal["bottom-up", "joint"] = "bottom-up"  # bottom-up: one block after the other, for equally many epochs
    inputs: Literal["student", "teacher"] = "student"  # of a block: the output of the block below, in this network
    prefix: Literal["frozen", "trained"] = "frozen"  # trained: a block's error also trains the blocks below it
    classifier: Literal["teacher", "fresh"] = "teacher"
    block_weights: tuple[Positive, ...] = ()  # of each block's error, from the bottom; default: 1 for all

    def phases(self, num_blocks: int) -> list[Phase]:
        """The phases of the stage, equally long: bottom-up one for each block, jointly one for all blocks."""
        if self.order == "joint":
            return [Phase(*[range(num_blocks)] * 3)]
        phases = []
        for index in range(num_blocks):
            runs = range(index if self.inputs == "teacher" else 0, index + 1)
            trains = range(0 if self.prefix == "trained" else index, index + 1)
            phases.append(Phase(runs, trains, targets=range(index, index + 1)))
        return phases

    def num_phases(self, num_blocks: int) -> int:
        return len(self.phases(num_blocks))

    @model_validator(mode="after")
    def _check_prefix(self) -> BlocksStage:
        if self.prefix == "trained" and self.inputs == "teacher":
            raise ValueError("prefix: trained needs inputs: student; no gradient passes through the teacher's outputs")
        return self


class KlStage(TaughtStage, LogitsStage):
    """Distillation of the teacher's logits at a temperature, mixed with cross-entropy and with block errors."""

    objective: Literal["kl"]
    loss: Literal["kl", "dist", "dkd"] = "kl"  # on the logits; see docs/method.md
    temperature: Temperature = 1.0
    standardise: bool = False  # z-scores of each sample's logits, student's and teacher's, take the logits' place
    target_weight: NonNegative = 1.0  # of loss: dkd, alpha: of the label against all other classes
    others_weight: NonNegative = 8.0  # of loss: dkd, beta: of the other classes among themselves
    labels_weight: Fraction = 0.0  # weight of the cross-entropy; the loss on the logits has the rest
    blocks_weight: NonNegative = 0.0  # weight of the sum of the blocks' mean squared errors, which comes on top
    teacher_logits: Literal["live", "stored"] = "live"  # stored: computed once for all stages of one teacher and stream
    top_k: Count | None = None  # stored logits: the K largest, and one number for all other classes; default: all

    @model_validator(mode="after")
    def _check_top_k(self) -> KlStage:
        if self.top_k and not self.has_stored_logits:
            raise ValueError("top_k: needs teacher_logits: stored; a live teacher gives all classes")
        if self.top_k and self.needs_all_classes:
            needy = "standardise" if self.standardise else f"loss: {self.loss}"
            raise ValueError(f"top_k: {needy} needs every class by itself; leave top_k out")
        return self

    @model_validator(mode="after")
    def _check_loss(self) -> KlStage:
        if self.blocks_weight and self.has_stored_logits:
            raise ValueError("blocks_weight: needs teacher_logits: live; outputs of blocks are not stored")
        if self.blocks_weight and self.quantised:
            raise ValueError("blocks_weight: compares blocks, and a network of 8 bits gives logits alone; leave it out")
        if self.class_weights and not self.labels_weight:
            raise ValueError("class_weights: weights the cross-entropy on the labels; set a labels_weight above 0")
        if self.loss == "dkd" and self.is_mixed:
            raise ValueError("loss: dkd needs one label for each image; leave mixup and cutmix out")
        weights = (self.target_weight, self.others_weight)
        if self.loss != "dkd" and weights != (1.0, 8.0):
            raise ValueError(f"target_weight and others_weight: belong to loss: dkd, which is {self.loss} here")
        if not any(weights):
            raise ValueError("target_weight and others_weight: one of them should be greater than 0")
        return self

    @property
    def has_stored_logits(self) -> bool:
        return self.teacher_logits == "stored"

    @property
    def needs_all_classes(self) -> bool:
        """Whether the loss is undefined for classes that are merged, as `top_k` does."""
        return self.standardise or self.loss != "kl"


Stage = Annotated[LabelsStage | BlocksStage | KlStage, Field(discriminator="objective")]
