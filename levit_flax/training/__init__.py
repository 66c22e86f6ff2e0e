"""Train and fine-tune models: recipes, data, distillation and resumable runs.

Requires `pip install 'levit-flax[train]'`: Grain reads the data, optax optimizes, Orbax saves checkpoints.
"""

try:
    from levit_flax.datasets import DataError as DataError
    from levit_flax.datasets import LabeledImages as LabeledImages

    from .data import read_images as read_images
    from .finetuning import finetune as finetune
    from .loop import NotFiniteError as NotFiniteError
    from .loop import Progress as Progress
    from .loop import TrainingStopped as TrainingStopped
    from .recipe import Recipe as Recipe
    from .recipe import RecipeError as RecipeError
    from .recipe import read_recipe as read_recipe
    from .teacher import store_logits as store_logits
except ModuleNotFoundError as error:
    raise ImportError(
        f"Training requires {error.name}, which is not installed. Run: pip install 'levit-flax[train]'"
    ) from error

__all__ = [
    "DataError",
    "LabeledImages",
    "NotFiniteError",
    "Progress",
    "Recipe",
    "RecipeError",
    "TrainingStopped",
    "finetune",
    "read_images",
    "read_recipe",
    "store_logits",
]
