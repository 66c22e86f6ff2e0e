"""The `levit-flax` command: reads arguments, calls the library, prints.

Results go to stdout, progress and warnings to stderr. Exit status 0, 1 (the work failed) or 2 (the call was wrong).
Everything heavy is imported inside the commands, so that `--help` is quick. Compiled models are kept in the user's
cache directory; JAX_ENABLE_COMPILATION_CACHE=false switches that off, JAX_COMPILATION_CACHE_DIR moves it.
"""

import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

app = typer.Typer(
    help="LeViT for JAX: convert PyTorch checkpoints, classify, evaluate, explain, fine-tune and export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

T = TypeVar("T")

DEFAULT_MODEL = "facebook/levit-128S"
MANY = 64  # images from which on a progress bar is worth its line


class DType(StrEnum):
    """The types that weights may be stored in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Layout(StrEnum):
    """The PyTorch layouts that are written."""

    HF = "hf"
    TIMM = "timm"
    TIMM_CONV = "timm_conv"
    FACEBOOK = "facebook"


def parse_image_size(text: str) -> int | tuple[int, int]:
    """Read "224" or "224x320"; anything else is a wrong call."""
    sides = text.lower().split("x")
    if not all(side.isdecimal() for side in sides) or len(sides) > 2:
        raise typer.BadParameter(f"expected SIDE or HEIGHTxWIDTH in pixels, such as 224 or 224x320; found {text!r}")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Directory or Hub id; cifar10 is the small model inside the package.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Use what is on this machine, without the network.")]


ImageSizeOption = Annotated[
    Any,
    typer.Option(
        parser=parse_image_size,
        metavar="SIDE|HEIGHTxWIDTH",
        help="Input size in pixels, if not the checkpoint's.",
    ),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line after the program's name; None for the process's own.

    Returns:
        The exit status.
    """
    # A model that was compiled once starts sooner. JAX reads this when it is imported; by itself it keeps only what
    # took a second, which small models do not.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(user_cache_directory() / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        app(args=arguments, prog_name="levit-flax")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def user_cache_directory() -> Path:
    """Return where this program may keep what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "levit-flax"


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Weight file, directory or Hub id of a PyTorch LeViT, or a converted model.")
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    to: Annotated[Layout | None, typer.Option(help="Write PyTorch weights in this layout instead.")] = None,
    fold: Annotated[bool, typer.Option("--fold", help="Fold the batch norms: faster, for inference only.")] = False,
    merge_heads: Annotated[
        bool, typer.Option("--merge-heads", help="Make one head of two, with their average as its logits.")
    ] = False,
    ema: Annotated[
        bool, typer.Option("--ema", help="Of a training checkpoint, take the averaged weights (model_ema).")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with PyTorch on seeded inputs, if installed.")
    ] = True,
    dtype: Annotated[DType | None, typer.Option(help="Type of the weights; the file's own if left out.")] = None,
    image_size: ImageSizeOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a PyTorch checkpoint into a model directory or back, with a report that proves it right."""
    from levit_flax.convert import workflow
    from levit_flax.hub import HubOptions

    report = workflow.convert_to_directory(
        source,
        out,
        layout=to and to.value,
        dtype=dtype and dtype.value,
        image_size=image_size,
        ema=ema,
        fold=fold,
        merge=merge_heads,
        verify=verify,
        options=HubOptions(revision, local_files_only=offline),
        overwrite=force,
    )
    if as_json:
        print(json.dumps({**report.to_dict(), "out": str(out)}, indent=2))
    else:
        print_fields(report.summary())
        print(f"written to {out}")


@app.command()
def classify(
    paths: Annotated[list[Path], typer.Argument(help="Images, and folders that are searched for images.")],
    model: ModelOption = DEFAULT_MODEL,
    top_k: Annotated[int, typer.Option(min=1, help="Classes to name for each image.")] = 5,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Name what is in images."""
    from levit_flax.classifier import ImageClassifier
    from levit_flax.memory import keep_freed_memory

    keep_freed_memory()
    files, broken = list_images(paths)
    classifier = ImageClassifier.from_pretrained(model, revision=revision, local_files_only=offline)
    show = JsonList() if as_json else PredictionTable()
    for path, logits in zip(files, with_progress(classifier.stream_logits(files), len(files)), strict=True):
        if isinstance(logits, Exception):
            broken[str(path)] = str(logits)
        else:
            show.add(str(path), classifier.name(logits, top_k))
    show.end()
    for reason in broken.values():
        print(f"error: {reason}", file=sys.stderr)
    if broken:
        raise typer.Exit(1)


def with_progress(results: Iterable[T], total: int) -> Iterator[T]:
    """Yield the results; on a terminal, and where there are many, show on stderr how far they are."""
    if total < MANY or not sys.stderr.isatty():
        yield from results
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(results, total=total, description="images", console=Console(stderr=True), transient=True)


class JsonList:
    """Print a JSON list with an object for each image, as they come."""

    def __init__(self) -> None:
        self.separator = "["

    def add(self, file: str, predictions: list[dict[str, Any]]) -> None:
        """Print one image's object."""
        print(self.separator + "\n  " + json.dumps({"file": file, "predictions": predictions}), end="")
        self.separator = ","

    def end(self) -> None:
        """Close the list."""
        print("[]" if self.separator == "[" else "\n]")


class PredictionTable:
    """Print a line for each class named, as they come, the image's name before the first."""

    def add(self, file: str, predictions: list[dict[str, Any]]) -> None:
        """Print one image's lines."""
        print(file)
        for prediction in predictions:
            print(f"  {prediction['score']:.4f}  {prediction['label']}")

    def end(self) -> None:
        """Print nothing more."""


def list_images(paths: Sequence[Path]) -> tuple[list[Path], dict[str, str]]:
    """Return the files to classify, folders searched in depth and in order, and what is wrong with the rest."""
    from levit_flax.datasets import image_files

    files, broken = [], {}
    for path in paths:
        if not path.is_dir():
            files.append(path)  # whatever it is: if it is no image, its reader says so
            continue
        found = image_files(path)
        files += found
        if not found:
            broken[str(path)] = f"The folder {path} holds no images."
    return files, broken


class Crop(StrEnum):
    """The rules by which accuracies were published."""

    MODEL = "model"
    HF = "hf"
    TORCHVISION = "torchvision"
    TIMM = "timm"


@app.command()
def evaluate(
    data: Annotated[str, typer.Argument(help="Directory with a folder for each class, or a Hugging Face dataset.")],
    model: ModelOption = DEFAULT_MODEL,
    crop: Annotated[Crop, typer.Option(help="How images are resized and cropped.")] = Crop.MODEL,
    split: Annotated[str, typer.Option(help="Part of a Hugging Face dataset.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1, help="Images computed at once.")] = 64,
    output: Annotated[
        Path | None, typer.Option(help="Directory for metrics.json, confusion.csv and confusion.png.")
    ] = None,
    image_size: ImageSizeOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how often a model is right."""
    from levit_flax import evaluation, files
    from levit_flax.classifier import ImageClassifier
    from levit_flax.memory import keep_freed_memory

    keep_freed_memory()
    if output is not None:
        from levit_flax.visualize import draw_confusion, new_figure

        new_figure(1, 1)  # what is missing for the images is said before the work, not after it
        files.make_directory(output)
    loaded = ImageClassifier.from_pretrained(model, image_size=image_size, revision=revision, local_files_only=offline)
    processor = evaluation.evaluation_processor(crop.value, loaded.processor)
    classifier = ImageClassifier(loaded.model, loaded.variables, processor, batch_size)
    labeled = evaluation.read_data(data, classifier.model.config.id2label, split)
    labeled = dataclasses.replace(labeled, images=with_progress(labeled.images, len(labeled)))
    result = evaluation.evaluate(classifier, labeled)
    numbers = {"model": model, "data": data, "crop": crop.value, **result.to_dict()}
    if output is not None:
        texts = {"metrics.json": json.dumps(numbers, indent=2) + "\n", "confusion.csv": result.confusion_csv()}
        for name, text in texts.items():
            files.write_text(output / name, text)
        figure = draw_confusion(result.confusion, result.labels)
        files.write_atomically(output / "confusion.png", lambda file: figure.savefig(file, format="png"))
    if as_json:
        print(json.dumps(numbers, indent=2))
    else:
        print_fields({**numbers, "broken": len(result.broken) or None})
    for reason in result.broken:
        print(f"error: {reason}", file=sys.stderr)
    if result.broken:
        raise typer.Exit(1)


@app.command()
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
        str, typer.Option(help="finetune, small_images, small_images_finish, paper, or a TOML file with the same keys.")
    ] = "finetune",
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Directory or Hub id of a model to learn from, or an .npz file of its logits.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUTPUT.")] = False,
    export_torch: Annotated[
        Layout | None, typer.Option(help="Write the best model for PyTorch too, in this layout.")
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
                export_torch=export_torch and export_torch.value,
                threads=threads,
                processes=processes,
                show=show,
                revision=revision,
                local_files_only=offline,
            )
    except training.TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(128 + stopped.signal) from None
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_fields(report)


@contextmanager
def training_progress() -> Iterator[Callable[[Any], None]]:
    """Give a function that shows on stderr how far a training is: a line for each evaluation, a bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  {task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=None, epoch=1, numbers="")
        last = None

        def show(now: Any) -> None:
            nonlocal last
            loss = "" if now.loss is None else f"loss {now.loss:.4f}  "
            accuracy = "" if now.accuracy is None else f"accuracy {now.accuracy:.2%}  "
            numbers = f"{loss}{accuracy}{now.images_per_second:.0f} images/s"
            bar.update(task, completed=now.step, total=now.total, epoch=now.epoch, numbers=numbers)
            if now.evaluation is not None and now.evaluation != last:
                last = now.evaluation
                values = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in last.items())
                console.print(f"{values}  {now.images_per_second:.0f} images/s")

        yield show


@app.command()
def explain(
    image: Annotated[Path, typer.Argument(help="The image to explain.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG file to write.")],
    model: ModelOption = DEFAULT_MODEL,
    label: Annotated[str | None, typer.Option(help="The class to explain; the likeliest if left out.")] = None,
    biases: Annotated[bool, typer.Option("--biases", help="Draw the attention biases instead.")] = False,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
) -> None:
    """Draw what a model sees in an image: class activation, gradient, and the attention of every block."""
    from levit_flax import visualize
    from levit_flax.classifier import ImageClassifier
    from levit_flax.files import write_atomically

    classifier = ImageClassifier.from_pretrained(model, revision=revision, local_files_only=offline)
    if biases:
        figure = visualize.draw_bias_tables(classifier.model, classifier.variables)
    else:
        figure = visualize.explain(classifier, image, label)
    write_atomically(output, lambda file: figure.savefig(file, format="png"))
    print(f"written to {output}")


class Format(StrEnum):
    """The formats of artifacts."""

    STABLEHLO = "stablehlo"
    ONNX = "onnx"


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    model: ModelOption = DEFAULT_MODEL,
    format: Annotated[Format, typer.Option(help="StableHLO runs in JAX, ONNX in onnxruntime.")] = Format.STABLEHLO,
    platforms: Annotated[str, typer.Option(help="Where StableHLO shall run.")] = "cpu,cuda,tpu",
    image_size: ImageSizeOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in OUT.")] = False,
) -> None:
    """Write a model as an artifact that runs without this library."""
    from levit_flax.classifier import ImageClassifier
    from levit_flax.export import export_model
    from levit_flax.files import check_free

    check_free(out, overwrite=force)
    classifier = ImageClassifier.from_pretrained(
        model, image_size=image_size, revision=revision, local_files_only=offline
    )
    export_model(
        out,
        classifier.model,
        classifier.variables,
        classifier.processor,
        format=format.value,
        platforms=platforms.split(","),
        overwrite=force,
    )
    print(f"written to {out}")


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(help="Directory or Hub id; left out, the published variants are listed.")
    ] = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Describe a model, or list the published variants."""
    facts = describe_variants() if model is None else describe_model(model, revision, offline)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        print_fields(facts)


def describe_variants() -> dict[str, Any]:
    """Return the parameter count and the widths of every published variant, with two heads."""
    import math

    from levit_flax.configuration import VARIANTS
    from levit_flax.modeling import LevitForImageClassificationWithTeacher, abstract_variables

    facts = {}
    for name, config in VARIANTS.items():
        leaves = abstract_variables(LevitForImageClassificationWithTeacher(config))
        facts[name] = {
            "parameters": sum(math.prod(leaf.shape) for path, leaf in leaves.items() if path.startswith("params/")),
            "hidden_sizes": list(config.hidden_sizes),
            "depths": list(config.depths),
        }
    return facts


def describe_model(source: str, revision: str | None, offline: bool) -> dict[str, Any]:
    """Return what is known of a model."""
    import jax

    from levit_flax.configuration import OWN_BLOCK
    from levit_flax.hub import HubOptions
    from levit_flax.loading import load_model

    model, variables, processor, found = load_model(source, HubOptions(revision, local_files_only=offline))
    config = model.config.to_dict()
    stored = json.loads((found.directory / "config.json").read_text(encoding="utf-8"))
    labels = model.config.id2label
    for key in ("id2label", "label2id", OWN_BLOCK):
        config.pop(key, None)
    return {
        "model": type(model).__name__,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "dtype": str(jax.numpy.dtype(model.param_dtype)),
        "folded": model.folded,
        "labels": f"{len(labels)}: {', '.join(labels[:3])}, ...",
        **config,
        "drop_path_rate": model.config.drop_path_rate,
        "preprocessing": processor.to_dict(),
        "weights": str(found.weights),
        "revision": found.revision,
        "provenance": stored.get(OWN_BLOCK, {}).get("provenance"),
    }


def print_fields(fields: dict[str, Any]) -> None:
    """Print a line for each field that says something."""
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items())
        if value not in (None, ""):
            print(f"{name:{width}}  {value}")


@app.command()
def demo() -> None:
    """Convert the model inside the package, prove it right, and name what is in real photographs."""
    from levit_flax.demo import run_demo

    run_demo()


if __name__ == "__main__":
    sys.exit(main())
