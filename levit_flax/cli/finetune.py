"""`levit-flax finetune`."""

from pathlib import Path
from typing import Annotated

import typer

from levit_flax.choices import RECIPE_NAMES, WrittenLayout

from .options import JsonOption, OfflineOption, RevisionOption
from .output import print_fields, print_json, print_notice, training_progress


def finetune(
    data: Annotated[
        str,
        typer.Argument(
            help="Directory with a folder for each class, or with train and validation that hold such folders; or a"
            " Hugging Face dataset."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the run, with the model in it.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Checkpoint to start from; left out, the recipe's architecture is trained anew."
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help=f"{', '.join(RECIPE_NAMES)}, or a TOML file with the same keys.")
    ] = "finetune",
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Directory or Hub id of a model to learn from, or an .npz file of its logits.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUTPUT.")] = False,
    export_torch: Annotated[
        WrittenLayout | None, typer.Option(help="Write the best model for PyTorch too, in this layout.")
    ] = None,
    skip: Annotated[
        Path | None,
        typer.Option(
            help="File with images to leave out, a line each: paths relative to DATA, or rows such as train/17."
        ),
    ] = None,
    check_data: Annotated[bool, typer.Option("--check-data", help="Decode every image before the first step.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads that decode and augment, in each process.")] = 2,
    processes: Annotated[int, typer.Option(min=0, help="Processes that do so beside this one.")] = 0,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="One of several hosts, found as the cluster says (TPU, SLURM, MPI).")
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(envvar="LEVIT_FLAX_COORDINATOR", help="Address host:port of process 0 of several."),
    ] = None,
    process_count: Annotated[
        int | None, typer.Option(min=1, envvar="LEVIT_FLAX_PROCESS_COUNT", help="Processes on all hosts.")
    ] = None,
    process_id: Annotated[
        int | None, typer.Option(min=0, envvar="LEVIT_FLAX_PROCESS_ID", help="Which of them this one is, from 0.")
    ] = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    force: Annotated[bool, typer.Option("--force", help="Begin anew in a directory that holds a run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model on labeled images, from a checkpoint or from scratch, with or without a teacher."""
    from levit_flax.memory import keep_freed_memory

    keep_freed_memory()
    if not (distributed or coordinator) and not (process_count is None and process_id is None):
        raise ValueError(
            "--process-count and --process-id (LEVIT_FLAX_PROCESS_COUNT, LEVIT_FLAX_PROCESS_ID) make one training of"
            " several processes: expected --coordinator (LEVIT_FLAX_COORDINATOR) with them."
        )
    if distributed or coordinator:
        import jax

        jax.distributed.initialize(coordinator, process_count, process_id)
    from levit_flax import training
    from levit_flax.training.data import read_skip_list
    from levit_flax.training.recipe import parse_change

    chosen = training.read_recipe(recipe, **dict(map(parse_change, changes or ())))
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
                skip=read_skip_list(skip) if skip else (),
                check_data=check_data,
                export_torch=export_torch,
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
