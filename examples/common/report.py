"""What the scripts say to people: the resolved settings, and what they could not use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator

from adamae_sampler.attention import attention_kernels
from adamae_sampler.models import AdaMAE, VideoClassifier
from common.devices import dtype_of, precision_of
from common.recipe import EncoderSettings, Recipe, Schedule


def describe_training(
    recipe: Recipe, schedule: Schedule, model: AdaMAE | VideoClassifier, accelerator: Accelerator, videos: int
) -> dict[str, str]:
    """The lines of the resolved recipe that every training has."""
    attention = attention_kernels(model, model.size.num_tokens, accelerator.device, dtype_of(accelerator))
    warmup = f"{schedule.warmup_steps} of warm-up" + (" (shortened to half the run)" if schedule.shortened else "")
    steps = f"{schedule.steps}, {warmup}, {schedule.steps * schedule.effective_batch / max(videos, 1):.1f} epochs"
    if not videos:
        steps = f"{recipe.epochs:g} epochs, {recipe.warmup_epochs:g} of warm-up; steps follow from the data"
    clip = f"clip {recipe.clip_grad:g}" if recipe.clip_grad else "no clipping"
    return {
        "batch": f"{recipe.batch_size} videos x {accelerator.num_processes} devices x {schedule.accumulation} "
        f"accumulated = {schedule.effective_batch}, {recipe.repeats} clips of each",
        "steps": steps,
        "learning rate": f"{recipe.base_lr:g} x {schedule.effective_batch} / 256 = {schedule.lr:.3g}, cosine to "
        f"{schedule.min_lr:.3g}",
        "optimizer": f"AdamW, betas {recipe.betas}, weight decay {recipe.weight_decay:g}, {clip}",
        "device": ", ".join([str(accelerator.device), precision_of(accelerator), *_parallel(recipe, accelerator)]),
        "attention": " and ".join(attention),
        "reading": f"{recipe.workers} processes for each device",
        "output": str(recipe.output),
    }


def _parallel(recipe: Recipe, accelerator: Accelerator) -> list[str]:
    """How processes share the work, and what saves memory or time."""
    wrappers = {"FSDP": "FSDP2", "DEEPSPEED": "DeepSpeed"}
    words = [wrappers.get(accelerator.distributed_type, "DDP" if accelerator.num_processes > 1 else "")]
    words += ["activations recomputed"] if recipe.checkpoint_activations else []
    words += [{"blocks": "blocks compiled", "whole": "compiled"}[recipe.compile]] if recipe.compile else []
    return [word for word in words if word]


def describe_clips(settings: EncoderSettings) -> str:
    """Which frames a clip takes, and its size."""
    frames = f"stride {settings.stride}" if settings.sampling == "dense" else "one of each"
    return (
        f"{settings.num_frames} frames, {settings.sampling} ({frames}), {settings.img_size[0]}x{settings.img_size[1]}"
    )


def describe_encoder(name: str, model: AdaMAE | VideoClassifier) -> str:
    """Name and size of a model."""
    size, blocks = model.size, model.encoder.blocks
    millions = sum(each.numel() for each in model.parameters()) / 1e6
    width = model.encoder.pos_embed.shape[-1]
    return f"{name}, {millions:.3g}M parameters, width {width}, {len(blocks)} blocks, grid {size.grid}"


def format_lines(lines: Mapping[str, str]) -> str:
    """Names and values in two columns."""
    return "\n".join(f"{name:>13}  {value}" for name, value in lines.items())


def check_output(output: Path, *new: str) -> None:
    """Raises ValueError if the output folder is a file, or has one of the files that are about to be written."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder.")
    if there := [name for name in new if (output / name).exists()]:
        raise ValueError(f"--output {output} has {', '.join(there)} already; name another folder, or delete it.")


def report_left_out(report: Path, left_out: list[str], what: str) -> None:
    """Prints and writes which videos could not be used and what became of them; removes an earlier file."""
    report.unlink(missing_ok=True)
    if not left_out:
        return
    print(f"{len(left_out)} videos {what} (also in {report}):")
    print("\n".join(f"  {message}" for message in left_out))
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n".join(left_out) + "\n", encoding="utf-8")
