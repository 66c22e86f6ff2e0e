"""Train the small LeViT that ships inside the package, and write everything that ships with it.

The model is transformers' own `LevitForImageClassificationWithTeacher`, trained in PyTorch on CIFAR-10, so that what
the package converts in `levit-flax demo` is a genuine PyTorch checkpoint. There is no teacher: both heads learn the
labels, and the answer is their average, as in LeViT at inference.

    python tools/train_embedded_model.py --data cifar10
    python tools/train_embedded_model.py --data cifar10 --from-phase 1    # from the shipped file on
    python tools/train_embedded_model.py --data cifar10 --from-phase 2    # only measure the shipped file again

`--data` holds `train/<class>/*.jpg` and `test/<class>/*.jpg`. Training has two phases, a long one with strong
augmentation and a short one with crops and flips alone; each writes the shipped files when it ends. About 90 minutes on
two idle cores. Needs `pip install -e '.[test]'` (torch, transformers, Pillow).
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import LevitConfig, LevitForImageClassificationWithTeacher, LevitImageProcessorPil

OUT = Path(__file__).parent.parent / "levit_flax" / "embedded"
SIZE = 80  # grids of 5, 3 and 2: every stage keeps more than one token
CIFAR_SIZE = 32
MARGIN = 4  # reflected border around a training picture, from which crops may start
BATCH = 256
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
CUTMIX_PROBABILITY = 0.4
WARMUP_EPOCHS = 2


class Phase(NamedTuple):
    """One run of the learning-rate schedule, up to its peak and down to zero."""

    epochs: int
    peak_learning_rate: float
    strong: bool  # all augmentation, or crops and flips alone


PHASES = (Phase(45, 2e-3, strong=True), Phase(10, 1e-3, strong=False))


def read_split(folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Read a folder per class into uint8 pictures [N H W C], labels [N] and the sorted class names."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    pictures, labels = [], []
    for label, name in enumerate(names):
        for path in sorted((folder / name).glob("*.jpg")):
            pictures.append(np.asarray(Image.open(path).convert("RGB")))
            labels.append(label)
    return np.stack(pictures), np.array(labels), names


def build_model(names: list[str]) -> LevitForImageClassificationWithTeacher:
    config = LevitConfig(
        image_size=SIZE,
        hidden_sizes=[48, 96, 160],
        num_attention_heads=[3, 6, 10],
        depths=[2, 3, 3],
        key_dim=[16, 16, 16],
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    model = LevitForImageClassificationWithTeacher(config)
    # The original code starts every residual branch at zero; transformers forgets to, and trains worse for it.
    for name, module in model.named_modules():
        if name.endswith(("module.projection.batch_norm", "module.linear_down.batch_norm")):
            torch.nn.init.zeros_(module.weight)
    return model


def build_processor() -> LevitImageProcessorPil:
    # A shortest edge of 70 means a resize to 256/224 * 70 = 80: the crop then keeps a square picture whole.
    return LevitImageProcessorPil(
        size={"shortest_edge": SIZE * 224 // 256}, crop_size={"height": SIZE, "width": SIZE}, resample=3
    )


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """Map [0, 255] float pictures [B C H W] to the range that the processor gives."""
    processor = build_processor()
    mean = torch.tensor(processor.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_std).view(1, 3, 1, 1)
    return (pictures / 255 - mean) / std


def augment(
    padded: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, num_labels: int, strong: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crop and flip one batch and, where `strong`, scale, jitter, erase and mix it too.

    Args:
        padded: uint8 [B C H W], the pictures inside their reflected border.
        labels: int [B].
        generator: the source of all randomness.
        num_labels: the number of classes.
        strong: whether to do all of it.

    Returns:
        Normalised float pictures [B C SIZE SIZE] and soft targets [B num_labels].
    """

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    batch, channels, height, _ = padded.shape
    # One scale a batch, a place of its own a picture.
    crop = int(uniform(1, low=24, high=CIFAR_SIZE + 3)) if strong else CIFAR_SIZE
    reach = height - crop + 1
    top = (uniform(batch) * reach).long()
    left = (uniform(batch) * reach).long()
    rows = top[:, None] + torch.arange(crop)  # [B crop]
    columns = left[:, None] + torch.arange(crop)
    flip = uniform(batch) < 0.5
    columns[flip] = columns[flip].flip(1)
    index = torch.arange(batch)[:, None, None]
    pictures = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).float()

    if strong:
        pictures = jitter(pictures, uniform)
    # The antialiased bicubic of PyTorch is Pillow's, so that training and the processor see the same pictures
    # (but for the overshoot at edges, which Pillow clips).
    pictures = F.interpolate(normalise(pictures), size=SIZE, mode="bicubic", antialias=True)
    targets = F.one_hot(labels, num_labels).float()

    if not strong:
        return pictures, targets
    if uniform(1) < CUTMIX_PROBABILITY:
        keep = float(uniform(1))
        side = int(SIZE * math.sqrt(1 - keep))
        y, x = (int(v) for v in uniform(2) * (SIZE - side + 1))
        pictures[:, :, y : y + side, x : x + side] = pictures.flip(0)[:, :, y : y + side, x : x + side].clone()
        mixed = (side / SIZE) ** 2
        targets = targets * (1 - mixed) + targets.flip(0) * mixed
    else:
        side = SIZE // 4
        for picture in range(0, batch, 4):  # random erasing, one picture in four
            y, x = (int(v) for v in uniform(2) * (SIZE - side + 1))
            pictures[picture, :, y : y + side, x : x + side] = torch.randn(channels, side, side, generator=generator)
    return pictures, targets


def jitter(pictures: torch.Tensor, uniform: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Change brightness, saturation and contrast of each picture, in [0, 255], at random."""
    batch = len(pictures)
    pictures = pictures * uniform(batch, 1, 1, 1, low=0.75, high=1.25)
    grey = pictures.mean(1, keepdim=True)
    pictures = grey + (pictures - grey) * uniform(batch, 1, 1, 1, low=0.6, high=1.4)
    centre = pictures.mean((1, 2, 3), keepdim=True)
    return (centre + (pictures - centre) * uniform(batch, 1, 1, 1, low=0.75, high=1.25)).clamp(0, 255)


def train(model: LevitForImageClassificationWithTeacher, data: Path, phase: Phase, seed: int) -> None:
    epochs = phase.epochs
    pictures, labels, names = read_split(data / "train")
    targets = torch.from_numpy(labels)
    padded = F.pad(torch.from_numpy(pictures).permute(0, 3, 1, 2).float(), (MARGIN,) * 4, mode="reflect").byte()
    generator = torch.Generator().manual_seed(seed)

    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        no_decay = parameter.ndim == 1 or name.endswith("attention_biases")
        (plain if no_decay else decayed).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=phase.peak_learning_rate,
    )
    steps_per_epoch = len(targets) // BATCH
    warmup, total = WARMUP_EPOCHS * steps_per_epoch, epochs * steps_per_epoch

    def learning_rate_factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    model.to(memory_format=torch.channels_last)
    for epoch in range(epochs):
        model.train()
        start, losses = time.perf_counter(), []
        order = torch.randperm(len(targets), generator=generator)
        for step in range(steps_per_epoch):
            batch = order[step * BATCH : (step + 1) * BATCH]
            inputs, soft = augment(padded[batch], targets[batch], generator, len(names), phase.strong)
            outputs = model(inputs.contiguous(memory_format=torch.channels_last))
            loss = sum(
                F.cross_entropy(logits, soft, label_smoothing=LABEL_SMOOTHING)
                for logits in (outputs.cls_logits, outputs.distillation_logits)
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item() / 2)
        seconds = time.perf_counter() - start
        speed = steps_per_epoch * BATCH / seconds
        line = f"epoch {epoch + 1}/{epochs}  loss {np.mean(losses):.4f}  {speed:.0f} pictures/s"
        if (epoch + 1) % 5 == 0:
            line += f"  test top-1 {evaluate(model, data)[0]:.2%}"
        print(line, flush=True)


def evaluate(model: LevitForImageClassificationWithTeacher, data: Path) -> tuple[float, int]:
    """Measure top-1 on the test split through the processor that ships with the model.

    Returns:
        The accuracy in [0, 1] and the number of pictures.
    """
    pictures, labels, _ = read_split(data / "test")
    processor = build_processor()
    model.eval()
    hits = 0
    with torch.inference_mode():
        for i in range(0, len(labels), 250):
            inputs = processor(list(pictures[i : i + 250]), return_tensors="pt")["pixel_values"]
            hits += int((model(inputs).logits.argmax(1).numpy() == labels[i : i + 250]).sum())
    return hits / len(labels), len(labels)


def load_shipped() -> LevitForImageClassificationWithTeacher:
    return LevitForImageClassificationWithTeacher.from_pretrained(OUT, dtype=torch.float32)


def write_probe() -> None:
    """Store seeded pictures and PyTorch's logits for them, in float32, as the demo's proof of a right conversion."""
    pictures = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
    inputs = normalise(torch.from_numpy(pictures).permute(0, 3, 1, 2).float())
    with torch.inference_mode():
        outputs = load_shipped().eval()(inputs)
    np.savez_compressed(
        OUT / "probe.npz",
        pixel_values=inputs.permute(0, 2, 3, 1).numpy().astype(np.float32),
        logits=outputs.logits.numpy(),
        cls_logits=outputs.cls_logits.numpy(),
        distillation_logits=outputs.distillation_logits.numpy(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--from-phase", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    for index in range(arguments.from_phase, len(PHASES)):
        model = load_shipped() if index else build_model(sorted(p.name for p in (arguments.data / "train").iterdir()))
        train(model, arguments.data, PHASES[index], arguments.seed + index)
        model.half().save_pretrained(OUT)
        build_processor().save_pretrained(OUT)
    write_probe()
    accuracy, pictures = evaluate(load_shipped(), arguments.data)
    weights = OUT / "model.safetensors"
    result = {
        "data": "CIFAR-10, half of the test split",
        "pictures": pictures,
        "top1": round(accuracy, 4),
        "parameters": sum(p.numel() for p in load_shipped().parameters()),
        "bytes": weights.stat().st_size,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }
    (OUT / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
