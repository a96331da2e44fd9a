"""Settings of data set, model, optimiser, strategy, weighting, averaging and stopping.

Every value the method leaves open is a typed field here, never a constant in code. The models are frozen, refuse
unknown keys, and import no torch, so that a study is validated and planned in about a second.

An *intervention* is a setting that influences the trajectory of the raw weights; an *observer* is one that does not
(EMA, patience): rows that differ only in observers share one training run. `OBSERVER_GROUPS` says which are which.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Task = Literal["classification", "detection", "segmentation"]
Depth = Annotated[int, Field(ge=1, le=10_000)] | Literal["all"]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Flips = Literal["none", "horizontal", "vertical", "both"]


class Frozen(BaseModel):
    """A settings group: immutable, complete, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SourceSettings(Frozen):
    """Which images, under which labels and in which split."""

    name: str = Field("phantom", description="data set by name: see `launch.py list`")
    root: str | None = Field(None, description="folder that holds the data set in its distributed layout")
    split: Literal["grouped", "official"] = Field(
        "grouped", description="grouped: our 80/10/10 over patients or lesions; official: the distributed lists"
    )
    split_seed: int = Field(2026, ge=0, lt=2**63, description="fixed for the data set, apart from the training seeds")
    images: int | None = Field(
        None,
        ge=40,
        le=10_000_000,
        description="phantoms: how many to draw; other data sets: a seeded sample of whole groups of about this size",
    )
    hospital: int = Field(0, ge=0, lt=2**63, description="phantoms: seed of the scanner's look and of the patients")
    uncertain: Literal["ones", "zeros", "ignore"] = Field(
        "ones", description="chexpert: uncertain labels count as present, as absent, or are masked in loss and metrics"
    )
    views: Literal["all", "frontal"] = Field("all", description="chexpert: all images, or frontal ones only")
    only_tb: bool = Field(False, description="tbx11k: the images with tuberculosis alone")
    merge_classes: bool = Field(False, description="tbx11k: active and obsolete tuberculosis as one class")
    table: str | None = Field(None, description="csv, coco: the table or json file, relative to the root or absolute")
    image_column: str | None = Field(
        None, description="csv: column of image names; extension optional, folders allowed"
    )
    group_column: str | None = Field(None, description="csv: column of what must not span two splits, such as patients")
    split_column: str | None = Field(None, description="csv: column of train, val (may be absent) and test")
    label_columns: tuple[str, ...] = Field((), description="csv: a column of 0 and 1 for each class")
    label_column: str | None = Field(None, description="csv: one column that names the class, or classes, of an image")
    label_separator: str | None = Field(
        None, min_length=1, description="csv: what separates several classes in label_column; none: one class an image"
    )
    encoding: str = Field("utf-8", description="csv: encoding of the table")
    channels: Literal[1, 3] | None = Field(
        None, description="csv, coco, yolo: 1 reads images as grey, 3 (default) as RGB"
    )
    group_pattern: str | None = Field(
        None,
        min_length=1,
        description="coco, yolo: regular expression whose first group (or all of it), as found in an image's name, "
        "must not span two splits, such as the patient: '^[0-9]+'; default: every image is its own group",
    )

    @field_validator("group_pattern")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern


class TestOnSettings(SourceSettings):
    """Another data set, on whose test split the trained model is tested too, over the labels that both have."""

    __test__ = False  # no test, whatever pytest makes of its name

    labels: dict[str, str] = Field(
        default_factory=dict, description="our label → theirs, beside those that agree by name"
    )


class DatasetSettings(SourceSettings):
    """The images that are trained and tested on, and how the network sees them."""

    image_size: int = Field(256, ge=16, le=2048, description="side of the square network input, px")
    fit: Literal["crop", "squash", "letterbox"] = Field(
        "crop",
        description="crop: shorter side to image_size, centre crop; squash: both sides to image_size; letterbox: "
        "longer side to image_size, the rest filled with grey",
    )
    flips: Flips = Field(
        "none",
        description="training images are seen flipped at random, boxes and masks along: horizontal exchanges left and "
        "right, vertical top and bottom; each flip with probability 1/2",
    )
    cache_gb: Positive | None = Field(
        None,
        description="most that decoded images may take in the storage, those of other data sets included, GB; without "
        "effect on results; null: what is free on its disk",
    )
    drop_classes: tuple[str, ...] = Field((), description="classes left out of training and tables, by name")
    test_on: TestOnSettings | None = Field(
        None, description="another data set to test on too; training then keeps to the labels that both have"
    )
    tested: Literal["home", "away"] = Field(
        "home", description="set by the study, which has cells of both: tested on the own test split, or on test_on's"
    )

    @model_validator(mode="after")
    def _away_is_somewhere(self) -> DatasetSettings:
        if self.tested == "away" and self.test_on is None:
            raise ValueError("dataset.tested is away: name the other data set by dataset.test_on.name")
        return self


# How a table is read: these act on results through the index alone, whose digest is part of every key.
READING = frozenset(
    {
        "uncertain",
        "views",
        "only_tb",
        "merge_classes",
        "table",
        "image_column",
        "group_column",
        "split_column",
        "label_columns",
        "label_column",
        "label_separator",
        "encoding",
        "channels",
        "group_pattern",
    }
)


class ModelSettings(Frozen):
    """Model of any task, and the head of classification."""

    backbone: str = Field(
        "tiny-phantom",
        description="classification: `tiny-phantom` (shipped), a hub id such as microsoft/rad-dino, a folder, "
        "timm:resnet50, timm:densenet121, timm:inception_v3 (each with .TAG for other weights than torchvision's), "
        "timm:deit_base_patch16_224 or albef; "
        "detection: yolov8n … yolov8x, rtdetr-l, rtdetr-x, or a model's YAML file; segmentation: tiny-sam2 "
        "(weights drawn from a fixed seed, untrained), a hub id such as facebook/sam2.1-hiera-tiny, or a folder",
    )
    head_hidden: int = Field(512, ge=1, le=100_000, description="classification: width of the head's two hidden layers")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.2, description="classification: dropout rate after each hidden layer"
    )
    weights: dict[str, str] = Field(
        default_factory=dict,
        description="classification: architecture (resnet50, albef, …) → file or folder of its weights; others come "
        "from the hub",
    )
    small: bool = Field(
        False,
        description="classification: timm's architectures and albef in a narrow form, with weights drawn from a fixed "
        "seed: for trying",
    )
    own_size: bool = Field(
        False,
        description="classification: timm's architectures and albef take images of the size that they were pretrained "
        "with, whatever dataset.image_size says; not if small",
    )
    mean: tuple[Fraction, ...] | None = Field(None, description="pixel mean in [0, 1]; default: the backbone's own")
    std: tuple[Positive, ...] | None = Field(None, description="pixel std in [0, 1]; default: the backbone's own")


class DetectionSettings(Frozen):
    """What detectors have beside a backbone: starting weights, gains of the loss, and how boxes are chosen."""

    weights: str | None = Field(
        None,
        description="file that the detector starts from: .pt of ultralytics, or .safetensors with the same names; "
        "null: drawn at random, the backbone the same for every seed",
    )
    boxes: str | None = Field(
        None,
        description="COCO json file with the boxes, absolute or relative to the data set's folder; null: the data "
        "set's own list",
    )
    box_gain: Annotated[float, Field(ge=0)] = Field(7.5, description="YOLO: factor of the box loss")
    class_gain: Annotated[float, Field(ge=0)] = Field(0.5, description="YOLO: factor of the classification loss")
    dfl_gain: Annotated[float, Field(ge=0)] = Field(1.5, description="YOLO: factor of the distribution focal loss")
    max_det: int = Field(100, ge=1, le=300, description="boxes kept an image, highest scores first; COCO's maxDets")
    min_score: Annotated[float, Field(ge=0, lt=1)] = Field(0.001, description="boxes of lower score are dropped")
    nms_iou: Annotated[float, Field(gt=0, le=1)] = Field(
        0.7, description="YOLO: of two boxes of a class that overlap more, the lower score is dropped"
    )


class SegmentationSettings(Frozen):
    """What segmenters have beside a backbone: structures and their masks, training prompts, gains of the loss."""

    structures: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        ("left_lung", "right_lung", "heart"), description="what is segmented; left and right are the patient's"
    )
    masks: str | None = Field(
        None,
        description="CheXmask's table of run-length codes, absolute or relative to dataset.root; null: image files "
        "masks/STRUCTURE/NAME.png there",
    )
    min_mask_quality: Fraction = Field(
        0.7, description="CheXmask: masks whose Dice RCA (Mean) is lower count neither in training nor in evaluation"
    )
    prompt: Literal["box", "point"] = Field(
        "box", description="prompt drawn from the masks, for training and for the labelled oracle metrics"
    )
    prompt_noise: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.1, description="box: standard deviation of each side's shift in training, as a share of the box's side"
    )
    focal_gain: Annotated[float, Field(ge=0)] = Field(20.0, description="factor of the focal loss")
    dice_gain: Annotated[float, Field(ge=0)] = Field(1.0, description="factor of the Dice loss")
    focal_alpha: Fraction = Field(0.25, description="α: weight of the pixels inside; 1 − α outside")
    focal_gamma: Annotated[float, Field(ge=0)] = Field(2.0, description="γ: how little well predicted pixels count")

    @field_validator("structures")
    @classmethod
    def _structures_differ(cls, structures: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in structures if structures.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} given twice")
        return structures


class OptimiserSettings(Frozen):
    """AdamW with an encoder and a head group; the schedule restarts with each of the two segments."""

    batch_size: int = Field(64, ge=1, le=1_000_000)
    encoder_lr: Positive = Field(3e-6, description="peak rate of unfrozen encoder parameters")
    head_lr: Positive = Field(5e-5, description="peak rate of the head")
    tune_head_lr: Positive | None = Field(None, description="peak rate of the head in stage 2; default: head_lr")
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    clip_norm: Positive | None = Field(1.0, description="largest global gradient norm; null: no clipping")
    schedule: Literal["cosine", "linear"] = Field("cosine", description="decay to 0 over each segment's steps")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 autocast on a GPU, else fp32")


class StrategySettings(Frozen):
    """Head stage, then progressive unfreezing: k(e) = min(K, step · (1 + ⌊(e − E1) / s⌋))."""

    head_epochs: int = Field(10, ge=1, le=10_000, description="E1: epochs of stage 1, encoder frozen")
    tune_epochs: int = Field(20, ge=1, le=10_000, description="E2: epochs of stage 2")
    unfreezing: Literal["none", "progressive", "static", "plain"] = Field(
        "progressive",
        description="none: the head alone trains in stage 2; static: K blocks from its first epoch; plain: K blocks "
        "from the first epoch of all, under one schedule",
    )
    depth: Depth = Field(10, description="K: blocks unfrozen at most, from the top; all: embeddings and norm too")
    step: int = Field(2, ge=1, le=10_000, description="blocks added at a time")
    every: int | None = Field(
        None, ge=1, le=10_000, description="s: epochs between additions; default max(1, round(E2 / 10))"
    )


class WeightingSettings(Frozen):
    """Hybrid class weights: frequency at the start of stage 2, refined by validation quality after each epoch."""

    enabled: bool = False
    eta: Annotated[float, Field(ge=0)] = Field(0.5, description="rate of the adaptive refinement; 0: none")
    boosts: dict[str, Positive] = Field(default_factory=dict, description="class → factor on its initial weight")
    clip: tuple[Positive, Positive] | None = Field((0.5, 5.0), description="bounds of the weights used in the loss")
    normalise: bool = Field(True, description="scale the weights to mean 1")

    @field_validator("clip")
    @classmethod
    def _ordered(cls, clip: tuple[float, float] | None) -> tuple[float, float] | None:
        if clip is not None and clip[0] > clip[1]:
            raise ValueError(f"lower bound {clip[0]} is above upper bound {clip[1]}")
        return clip


class EmaSettings(Frozen):
    """Averaged copy that a row is evaluated on: d_t = decay · (1 − exp(−t / tau)), t in optimiser steps of stage 2."""

    enabled: bool = Field(False, description="evaluate the averaged copy; false: the raw weights")
    decay: Annotated[float, Field(gt=0, lt=1)] = Field(0.999, description="d: without effect unless enabled")
    tau: Positive = Field(100.0, description="steps of warm-up")


class StoppingSettings(Frozen):
    """Early stopping on the row's own validation metric, counted from stage 2's first epoch."""

    patience: int | None = Field(7, ge=1, le=10_000, description="epochs without improvement; null: never stop early")


def _default(group: type[BaseModel], name: str) -> object:
    return group.model_fields[name].get_default(call_default_factory=True)


class Settings(Frozen):
    """Everything one cell needs besides its seed."""

    task: Task = "classification"
    dataset: DatasetSettings = DatasetSettings()
    model: ModelSettings = ModelSettings()
    detection: DetectionSettings = DetectionSettings()
    segmentation: SegmentationSettings = SegmentationSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    strategy: StrategySettings = StrategySettings()
    weighting: WeightingSettings = WeightingSettings()
    ema: EmaSettings = EmaSettings()
    stopping: StoppingSettings = StoppingSettings()

    @model_validator(mode="after")
    def _other_tasks_are_left_alone(self) -> Settings:
        """A setting that the task does not have keeps its default: to change it would say what nothing does."""
        idle = [
            f"{group}.{name} acts in the task {task} alone; this is {self.task}: leave it out"
            for (group, names), task in ONLY_IN_TASK.items()
            if task != self.task
            for name in names or type(getattr(self, group)).model_fields
            if getattr(getattr(self, group), name) != _default(type(getattr(self, group)), name)
        ]
        if idle:
            raise ValueError("; ".join(idle))
        return self

    @model_validator(mode="after")
    def _other_data_go_with_the_task(self) -> Settings:
        if self.dataset.test_on is not None and self.task != "classification":
            raise ValueError(f"dataset.test_on: the task {self.task} has no labels by name; leave it out")
        return self

    @model_validator(mode="after")
    def _pixel_statistics_agree(self) -> Settings:
        mean, std = self.model.mean, self.model.std
        if (mean is None) != (std is None):
            raise ValueError("model.mean and model.std are given together or not at all")
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) not in (1, 3):
                raise ValueError(f"model.{name} has {len(values)} values; expected 1 or 3")
        return self


# (group, names of its settings; none means all) → the one task that has them.
ONLY_IN_TASK: dict[tuple[str, tuple[str, ...]], Task] = {
    ("model", ("head_hidden", "dropout", "weights", "small", "own_size")): "classification",
    ("detection", ()): "detection",
    ("segmentation", ()): "segmentation",
}
OBSERVER_GROUPS = ("ema", "stopping")
