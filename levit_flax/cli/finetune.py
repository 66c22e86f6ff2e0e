"""The command `levit-flax finetune`."""

from pathlib import Path
from typing import Annotated

import typer

from levit_flax.choices import _RECIPE_NAMES, _WrittenLayout

from .options import (
    DataRevisionOption,
    ImageColumnOption,
    JsonOption,
    LabelColumnOption,
    MaxPixelsOption,
    OfflineOption,
    RevisionOption,
)
from .output import print_fields, print_json, print_notice, training_progress


def finetune(  # long: its parameters are the options, with their help
    data: Annotated[
        str,
        typer.Argument(
            help="Directory with one folder per class, or with the folders train and validation that contain such"
            " folders; or a dataset: hfds/NAME[:CONFIG] or tfds/NAME[:VERSION]."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Run directory; the best model is saved in OUTPUT/model.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Checkpoint to start from; by default, train the recipe's architecture from scratch.",
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help=f"Training recipe: {', '.join(_RECIPE_NAMES)}, or a TOML file with the same keys.")
    ] = "finetune",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; can be repeated."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Directory or Hub id of a teacher model, or an .npz file with its logits.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint in OUTPUT.")] = False,
    export_torch: Annotated[
        _WrittenLayout | None, typer.Option(help="Also write the best model as PyTorch weights in this layout.")
    ] = None,
    skip: Annotated[
        Path | None,
        typer.Option(
            help="File that lists images to skip, one per line: paths, or dataset rows such as train/17, as errors"
            " print them."
        ),
    ] = None,
    check_data: Annotated[bool, typer.Option("--check-data", help="Decode every image before the first step.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads per process that decode and augment images.")] = 2,
    processes: Annotated[
        int, typer.Option(min=0, help="Worker processes that decode and augment images; 0 uses this process.")
    ] = 0,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Train on all hosts of a TPU, SLURM or MPI cluster.")
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(envvar="LEVIT_FLAX_COORDINATOR", help="Train on several hosts: HOST:PORT of process 0."),
    ] = None,
    process_count: Annotated[
        int | None, typer.Option(min=1, envvar="LEVIT_FLAX_PROCESS_COUNT", help="Number of processes on all hosts.")
    ] = None,
    process_id: Annotated[
        int | None, typer.Option(min=0, envvar="LEVIT_FLAX_PROCESS_ID", help="Index of this process, from 0.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of a dataset to train on, such as train[:80%]; or a folder in DATA.")
    ] = None,
    data_revision: DataRevisionOption = None,
    image_column: ImageColumnOption = None,
    max_image_pixels: MaxPixelsOption = None,
    label_column: LabelColumnOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the training run in OUTPUT and start from step 0.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model on labeled images, from a checkpoint or from scratch."""
    from levit_flax.memory import keep_freed_memory

    keep_freed_memory()
    _start_distributed(distributed, coordinator, process_count, process_id)
    from levit_flax import training
    from levit_flax.training.data import _read_skip_list
    from levit_flax.training.recipe import _parse_change

    chosen = training.read_recipe(recipe, **dict(map(_parse_change, changes or ())))
    try:
        with training_progress() as show:
            report = training.finetune(
                data,
                output,
                model=model,
                recipe=chosen,
                teacher=teacher,
                resume=resume,
                overwrite=force,
                skip=_read_skip_list(skip) if skip else (),
                check_data=check_data,
                export_torch=export_torch,
                split=split,
                data_revision=data_revision,
                image_column=image_column,
                label_column=label_column,
                threads=threads,
                processes=processes,
                show=show,
                revision=revision,
                local_files_only=offline,
            )
    except training.TrainingStopped as stopped:
        print_notice(stopped)
        raise typer.Exit(128 + stopped.signal) from None
    if as_json:
        print_json(report)
    else:
        print_fields(report)


def _start_distributed(
    distributed: bool, coordinator: str | None, process_count: int | None, process_id: int | None
) -> None:
    """Connect to the other processes of the training run, if there are any."""
    if distributed or coordinator:
        import jax

        jax.distributed.initialize(coordinator, process_count, process_id)
    elif process_count is not None or process_id is not None:
        raise ValueError(
            "--process-count and --process-id (LEVIT_FLAX_PROCESS_COUNT, LEVIT_FLAX_PROCESS_ID) describe a training run"
            " of several processes: expected --coordinator (LEVIT_FLAX_COORDINATOR) with them, found none."
        )
