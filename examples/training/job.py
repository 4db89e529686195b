"""The parts of a training run, made from a recipe, and the lines that describe the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from accelerate import Accelerator
from accelerate.utils import set_seed

from adamae_sampler.attention import attention_kernels
from adamae_sampler.models import AdaMAE, VideoClassifier
from common.devices import dtype_of, precision_of
from common.models import create_model
from common.report import describe_encoder
from training.recipe import AnyRecipe, Recipe
from training.resume import Resumed
from training.schedule import Schedule
from video_data.clips import ClipSource

AnyModel = TypeVar("AnyModel", bound=AdaMAE | VideoClassifier)


@dataclass(frozen=True)
class Job(Generic[AnyRecipe, AnyModel]):
    """The parts of a run.

    Attributes:
        recipe: the settings.
        accelerator: devices and processes.
        schedule: batches, steps and learning rates.
        source: the clips to train on.
        model: the model, on the CPU, not yet prepared. Every process has the same weights.
        resumed: the checkpoint to go on from, or None.
    """

    recipe: AnyRecipe
    accelerator: Accelerator
    schedule: Schedule
    source: ClipSource
    model: AnyModel
    resumed: Resumed | None

    @classmethod
    def build(
        cls,
        recipe: AnyRecipe,
        accelerator: Accelerator,
        source: ClipSource,
        resume: Path | None,
        family: str,
        model_args: dict[str, Any],
    ) -> Job[AnyRecipe, AnyModel]:
        """Makes the model and reads the checkpoint.

        Args:
            recipe: the settings.
            accelerator: devices and processes.
            source: the clips to train on.
            resume: a checkpoint to go on from.
            family: pattern of the models that the script trains, as in `timm.list_models`.
            model_args: keyword arguments of the model.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: the recipe is not possible on these devices, the model is unknown, or the run cannot go on from
                the checkpoint.
        """
        schedule = Schedule.of(recipe, len(source), accelerator.num_processes)
        set_seed(recipe.seed)  # the same weights on every process
        model = create_model(recipe.model, family, **model_args)
        model.set_grad_checkpointing(recipe.checkpoint_activations)
        return cls(recipe, accelerator, schedule, source, model, Resumed.load(resume, recipe, schedule, source))

    def describe(self) -> dict[str, str]:
        """What is known once the model is made: lines by name, after those of `describe_schedule`."""
        recipe, accelerator, model = self.recipe, self.accelerator, self.model
        attention = attention_kernels(model, model.size.num_tokens, accelerator.device, dtype_of(accelerator))
        return {
            "model": describe_encoder(recipe.model, model),
            "device": ", ".join([str(accelerator.device), precision_of(accelerator), *_parallel(recipe, accelerator)]),
            "attention": " and ".join(attention),
            **({"resumes": self.resumed.describe(accelerator, recipe)} if self.resumed else {}),
        }


def _parallel(recipe: Recipe, accelerator: Accelerator) -> list[str]:
    """The words for the wrapper (DDP, FSDP2, DeepSpeed), recomputed activations and compilation."""
    wrappers = {"FSDP": "FSDP2", "DEEPSPEED": "DeepSpeed"}
    words = [wrappers.get(accelerator.distributed_type, "DDP" if accelerator.num_processes > 1 else "")]
    words += ["activations recomputed"] if recipe.checkpoint_activations else []
    words += [{"blocks": "blocks compiled", "whole": "compiled"}[recipe.compile]] if recipe.compile else []
    return [word for word in words if word]
