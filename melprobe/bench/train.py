"""Training steps by us and by the Hugging Face Trainer: one model, one recipe, the same clips.

Both minimise the next-token loss alone, in one process and bfloat16 autocast, clip gradients,
change clips in the same ways in as many data workers, and move the same weights by fused AdamW (the
Trainer has no Muon and no framewise targets). The Trainer groups clips by length and takes as many
in a batch as ours hold on average; its model is what `from_pretrained` would give, in float32 and
with the attention that transformers takes. It runs plain and with `torch_compile`, and the faster
counts. It has as many threads as ours, which on two cores is faster than its default.

Positions that are not padding are counted, from the first step after the warm-up to the end of the
last. On a CPU `ratio_trainer_cpu` compares processor time in the training process instead, which
other work on the machine hardly changes.

MFU: the flop of the steps (`melprobe.training.flop`) over what a matrix product in bfloat16 reaches
on the same device in the same process (on an H100 over 989 TFLOP/s, where that is more).
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from melprobe.bench.peak import measure_peak, now
from melprobe.corpus.manifest import find_manifest, read_manifest
from melprobe.training.data import SpeechBatches
from melprobe.training.flop import training_flop
from melprobe.training.loop import fit
from melprobe.training.recipe import Corpus, SpeechRecipe, Stage
from melprobe.training.speech import SpeechTask

WARMUP = 15
RIVALS = {"plain": False, "torch_compile": True}
_CLIPS = 2000  # in an epoch at least: the Trainer sorts within fifty batches


class Pace:
    """What went through a model after the warm-up, and how long that took."""

    def __init__(self, device: torch.device):
        self.device = device
        self.steps = 0
        self.seconds = self.cpu_seconds = 0.0
        self._seen: list[dict[str, Tensor]] = []

    def step(self, batch: Mapping[str, Tensor], audio_token_id: int) -> None:
        """A step begins, its batch at hand."""
        if self.steps == WARMUP:
            self.seconds, self.cpu_seconds = -now(self.device), -time.process_time()
        if self.steps >= WARMUP:  # summed up at the end: a GPU need not be waited for
            self._seen.append(
                {
                    "positions": batch["attention_mask"].sum(),
                    "padded": torch.tensor(batch["attention_mask"].numel()),
                    "patches": (batch["input_ids"] == audio_token_id).sum(),
                    "answers": (batch["labels"] != -100).sum(),
                    "frames": batch["feature_attention_mask"].sum(),
                }
            )
        self.steps += 1

    def end(self) -> None:
        self.seconds += now(self.device)
        self.cpu_seconds += time.process_time()

    def counts(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for seen in self._seen:
            found.update({name: int(number) for name, number in seen.items()})
        return found

    def tokens_per_s(self) -> float:
        return self.counts()["positions"] / self.seconds

    def tokens_per_cpu_s(self) -> float:
        return self.counts()["positions"] / self.cpu_seconds

    def __str__(self) -> str:
        wall, cpu = self.tokens_per_s(), self.tokens_per_cpu_s()
        return f"{wall:.0f} positions a second, {cpu:.0f} a second of processor time"

    def filled(self) -> float:
        """The share of positions that are not padding."""
        return self.counts()["positions"] / self.counts()["padded"]


def bench_train(
    recipe: SpeechRecipe,
    manifest: str,
    steps: int,
    batch_seconds: float | None,
    device: torch.device,
    tell: Callable[[str], None],
) -> dict[str, object]:
    """Positions a second of both, their ratio, and the share of the device's peak that ours reach.

    manifest: what to train on, for `steps` steps after the warm-up, instead of the recipe's own.
    `ratio_without_compile` is what compiling brings, where the recipe asks for it. tell: hears a
    line for each run.
    """
    threads = torch.get_num_threads()
    peak = measure_peak(device)
    tell(f"peak: {peak / 1e12:.2f} TFLOP/s")
    with TemporaryDirectory() as place:
        made = _plain(recipe, manifest, WARMUP + steps, batch_seconds, Path(place))
        task = SpeechTask(made)
        batches = [ids for _, ids in task.order]
        pace = _ours(task, made, device)
        tell(f"ours: {pace}")
        paces = {}
        if made.compile:
            torch.compiler.reset()
            eager = made.model_copy(update={"compile": False, "out": Path(place) / "eager"})
            paces["without_compile"] = _ours(SpeechTask(eager), eager, device)
            tell(f"ours, not compiled: {paces['without_compile']}")
        clips = round(sum(map(len, batches)) / len(batches))
        for name, compiled in RIVALS.items():
            torch.compiler.reset()
            paces[name] = _theirs(made, clips, device, compiled=compiled)
            tell(f"Trainer, {name}: {paces[name]}")
    speed = {name: found.tokens_per_s() for name, found in paces.items()}
    best = max(RIVALS, key=lambda name: speed[name])
    ours = pace.tokens_per_s()
    parts = {}
    if device.type == "cpu":
        cpu = {name: pace.tokens_per_cpu_s() / paces[name].tokens_per_cpu_s() for name in RIVALS}
        parts["ratio_trainer_cpu"] = round(min(cpu.values()), 2)
    if "without_compile" in speed:
        parts["ratio_without_compile"] = round(ours / speed["without_compile"], 2)
    return {
        "tokens_per_s": round(ours),
        "mfu": float(f"{training_flop(task.model, pace.counts()) / pace.seconds / peak:.3g}"),
        "ratio_trainer": round(ours / speed[best], 2),
        "trainer": best,
        **{f"tokens_per_s_trainer_{name}": round(speed[name]) for name in RIVALS},
        **parts,
        "steps": steps,
        "tokens_per_step": round(pace.counts()["positions"] / steps),
        "clips_per_step": clips,
        "filled": round(pace.filled(), 3),
        "filled_trainer": round(paces[best].filled(), 3),
        "peak_tflops": round(peak / 1e12, 2),
        "dtype": "bfloat16",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": threads,
        "threads_training": torch.get_num_threads(),
        "workers": made.data.workers,
    }


def _plain(
    recipe: SpeechRecipe, manifest: str, steps: int, batch_seconds: float | None, out: Path
) -> SpeechRecipe:
    """The recipe's model, clips' lengths and changes, with what a Trainer can do as well."""
    clips = len(read_manifest(find_manifest(manifest)))
    last = recipe.data.stages[-1]
    stage = Stage(
        steps=steps,
        min_seconds=last.min_seconds,
        max_seconds=last.max_seconds,
        batch_seconds=batch_seconds or last.batch_seconds,
    )
    data = {
        "train": (Corpus(manifest=manifest, repeat=-(-_CLIPS // clips)),),
        "dev": ("builtin/test",),  # which nobody measures here
        "dev_clips": 8,
        "test": (),
        "stages": (stage,),
        "copy_share": 0.0,
    }
    lora = recipe.model.lora and recipe.model.lora.model_copy(update={"init": None, "held": ()})
    return recipe.model_copy(
        update={
            "out": out / "ours",
            "precision": "bf16",
            "model": recipe.model.model_copy(update={"init": None, "lora": lora}),
            "data": recipe.data.model_copy(update=data),
            "optim": recipe.optim.model_copy(update={"muon": False, "accumulate": 1}),
            "ctc": None,
            "frames": None,
            "distil": None,
            "evaluate_every": steps,
        }
    )


class _Timed:
    """A task that only trains, against the clock."""

    def __init__(self, task: SpeechTask, pace: Pace):
        self.task, self.pace = task, pace
        self.model, self.heads, self.losses = task.model, task.heads, task.losses

    def batches(self, *where: Any) -> Iterable[tuple[int, Any]]:
        for step, batch in self.task.batches(*where):
            self.pace.step(batch, self.task.processor.audio_token_id)
            yield step, batch

    def evaluate(self, step: int) -> dict[str, float]:
        """The last step is done."""
        self.pace.end()
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Nobody wants them."""
        return {}

    def save(self, folder: Path, tensors: dict[str, Tensor], log: list[dict[str, Any]]) -> None:
        """Nobody wants it."""


def _ours(task: SpeechTask, recipe: SpeechRecipe, device: torch.device) -> Pace:
    pace = Pace(device)
    fit(_Timed(task, pace), recipe, device)
    return pace


class _Clips(Dataset[dict[str, Any]]):
    """Ids of clips, each as long as the Trainer is to think."""

    def __init__(self, task: SpeechTask):
        cuts = task.order._cuts_of(0, task.recipe.data.stages[0])
        self.items = [{"input_ids": range(round(100 * c.duration)), "clip": c.id} for c in cuts]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


class _TimedTrainer(Trainer):
    pace: Pace

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.pace.step(inputs, self.model.config.audio_token_id)
        return super().training_step(model, inputs, *args, **kwargs)


def _theirs(recipe: SpeechRecipe, clips: int, device: torch.device, *, compiled: bool) -> Pace:
    task = SpeechTask(recipe.model_copy(update={"precision": "float32"}))
    task.model.accepts_loss_kwargs = False
    loader = SpeechBatches(task.clips, task.processor, recipe.data, recipe.augment, 0, frames=False)
    numbers = count()

    def collate(items: Sequence[Mapping[str, Any]]) -> Mapping[str, Tensor]:
        return loader[next(numbers), [item["clip"] for item in items]][1]

    optim, workers = recipe.optim, recipe.data.workers
    settings = TrainingArguments(
        output_dir=str(recipe.out / "trainer"),
        per_device_train_batch_size=clips,
        max_steps=recipe.steps,
        train_sampling_strategy="group_by_length",
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=4 if workers else None,
        remove_unused_columns=False,
        bf16=True,
        optim="adamw_torch_fused",
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        max_grad_norm=optim.clip,
        warmup_steps=optim.warmup,
        lr_scheduler_type="cosine",
        torch_compile=compiled,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    settings._n_gpu = 1  # or it would spread each batch over all there are
    trainer = _TimedTrainer(task.model, settings, data_collator=collate, train_dataset=_Clips(task))
    trainer.pace = Pace(device)
    trainer.train()
    trainer.pace.end()
    return trainer.pace
