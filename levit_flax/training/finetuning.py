"""Train or fine-tune a model in one call."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from levit_flax.arguments import _check_types
from levit_flax.datasets import LabeledImages, _DataOptions
from levit_flax.hub import _HubOptions

from .hosts import _run_on_hosts
from .loop import Progress, _run_plan
from .outputs import _MODEL_DIRECTORY, _TORCH_DIRECTORY
from .plan import _make_plan
from .recipe import Recipe, RecipeError
from .run_directory import _prepare_output


@_check_types
def finetune(
    data: str | Path | LabeledImages | Sequence[Any] | Mapping[str, Any],
    output: str | Path,
    *,
    model: str | Path | None = None,
    recipe: Recipe | str | Path = "finetune",
    teacher: str | Path | Callable[[jax.Array], jax.Array] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    skip: Collection[str | Path] = (),
    check_data: bool = False,
    export_torch: str | None = None,
    split: str | None = None,
    data_revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    threads: int = 2,
    processes: int = 0,
    show: Callable[[Progress], None] | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> dict[str, Any]:
    """Train a model on labeled images, on all devices of all hosts.

    Args:
        data: the images, as in `read_images`.
        output: the run directory; created if it does not exist.
        model: the checkpoint to start from, as in `levit_flax.from_pretrained`; None trains the recipe's architecture
            from scratch.
        recipe: how to train: a `Recipe`, or an argument of `read_recipe`.
        teacher: for recipes with distillation: a checkpoint, as in `levit_flax.from_pretrained`; an .npz file written
            by `store_logits`; or a function from pixel values [B H W C], normalized for the student, to logits [B L] in
            the order of the student's classes.
        resume: continue from the last checkpoint of the run in `output`, if there is one.
        overwrite: replace the run in `output`.
        skip: images to leave out, as in `read_images`.
        check_data: decode every image before the first step.
        export_torch: PyTorch layout in which to write the best model as well, such as "hf".
        split: as in `read_images`.
        data_revision: as in `read_images`.
        image_column: as in `read_images`.
        label_column: as in `read_images`.
        threads: number of threads that decode and augment images, in each process.
        processes: number of worker processes that decode and augment images; 0 decodes in this process.
        show: called after each step with the progress.
        revision: branch, tag or commit of `model` on the Hub; None for its main branch. The teacher is always
            loaded from its main branch.
        token: access token for the Hub; None for the one stored by `hf auth login` or in HF_TOKEN.
        cache_dir: directory for downloads; None for huggingface_hub's own cache.
        local_files_only: do not access the network.

    Returns:
        The report, which is also written to `output`: the best and the last evaluation, images per second, and the
        share of the time spent waiting for data.

    Raises:
        ValueError: `threads` is less than 1, or `processes` less than 0.
        RecipeError: the recipe is invalid, or does not fit the data, the model or the devices.
        DataError: the data cannot be used. If this is found during training on one host, the state is saved first. On
            several hosts, resume from the last checkpoint.
        NotFiniteError: the loss or a gradient is NaN or infinite.
        TrainingStopped: SIGTERM or SIGINT was received; the state is saved.
        FileExistsError: the directory contains a run, and neither `resume` nor `overwrite` is set.
        OSError: a file cannot be read or written.

    Examples:
        >>> import tempfile
        >>> from PIL import Image
        >>> shape = {"image_size": 32, "hidden_sizes": [8, 16], "num_attention_heads": [1, 1], "depths": [1, 1]}
        >>> shape |= {"key_dim": [8, 8], "attention_ratio": [2, 2], "mlp_ratio": [2, 2]}
        >>> recipe = Recipe(architecture=shape, epochs=1, warmup_epochs=0, batch_size=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for i in range(8):
        ...         path = Path(folder, "data", ("cat", "dog")[i % 2], f"{i}.png")
        ...         path.parent.mkdir(parents=True, exist_ok=True)
        ...         Image.new("RGB", (32, 32)).save(path)
        ...     report = finetune(f"{folder}/data", f"{folder}/run", recipe=recipe)
        ...     sorted(path.name for path in Path(folder, "run", "model").iterdir())[:3]
        ['README.md', 'config.json', 'flax_model.safetensors']
        >>> sorted(report["best"])[:3]
        ['epoch', 'learning_rate', 'step']
    """
    plan = _make_plan(
        data,
        output,
        model=model,
        recipe=recipe,
        teacher=teacher,
        resume=resume,
        overwrite=overwrite,
        skip=skip,
        check_data=check_data,
        export_torch=export_torch,
        threads=threads,
        processes=processes,
        subset=_DataOptions(split, data_revision, image_column, label_column),
        options=_HubOptions(revision, token, cache_dir, local_files_only),
    )
    _run_on_hosts(lambda: _prepare_output(plan.output, plan.settings, plan.resumed), only_first=True)
    try:
        report = _run_plan(plan, show)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RecipeError(
            f"The devices do not have enough memory for batches of {plan.recipe.batch_size} images in"
            f" {plan.recipe.accumulation} parts. Lower batch_size, or raise accumulation."
        ) from error
    if plan.export_torch and jax.process_index() == 0:
        from levit_flax.convert.workflow import _convert_to_directory

        directory = plan.output / _TORCH_DIRECTORY
        _convert_to_directory(
            str(plan.output / _MODEL_DIRECTORY), directory, layout=plan.export_torch, overwrite=True, verify=True
        )
    return report
