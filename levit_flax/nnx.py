"""LeViT as a `flax.nnx` module, and back.

The Linen modules stay the only implementation. `nnx.bridge.ToNNX` wraps them too, but it has no training mode, and it
replaces the variables that a call updates, so that `nnx.jit(..., graph=False)` loses the running statistics.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from .checkpoint import _check_variables
from .modeling import LevitBase, Variables

# The type of the NNX variables of each Linen collection.
_TYPES: dict[str, type[nnx.Variable[Any]]] = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


class LevitNNX(nnx.Module):
    """A LeViT as an NNX module, made by `to_nnx`.

    The variables have the names of the Linen model: `module.stem["conv_0"]["conv"]["kernel"]`. Parameters are of type
    `nnx.Param`, running statistics and batch counters of type `nnx.BatchStat`. In training mode (`module.train()`), a
    call normalizes with the statistics of the batch, updates the running statistics, and draws a key for stochastic
    depth if the config's `drop_path_rate` is above 0. A new module is in evaluation mode (`module.eval()`).

    Attributes:
        model: the Linen module that computes the outputs.
        deterministic: False in training mode.
        rngs: the stream of random keys "drop_path".

    Examples:
        >>> from levit_flax import from_pretrained
        >>> module = to_nnx(*from_pretrained("cifar10"))
        >>> module.train()
        >>> module.deterministic, type(module.head["norm"]["mean"]).__name__
        (False, 'BatchStat')
    """

    def __init__(self, model: LevitBase, variables: Mapping[str, Any], rngs: nnx.Rngs | nnx.RngStream) -> None:
        self.model = model
        self.deterministic = True
        self.rngs = (rngs["drop_path"] if isinstance(rngs, nnx.Rngs) else rngs).fork()
        wrapped = {
            path: variable_type(leaf)
            for collection, variable_type in _TYPES.items()
            for path, leaf in flatten_dict(variables.get(collection, {})).items()
        }
        for name, tree in unflatten_dict(wrapped).items():
            setattr(self, name, nnx.data(tree))

    def __call__(self, pixel_values: jax.Array, **options: Any) -> Any:
        """Compute what the Linen model computes.

        Args:
            pixel_values: float [B H W C], normalized as by `LevitImageProcessor`.
            options: the other arguments of the Linen model by keyword, except `train`: `labels`, `return_dict` and
                those that start with `output_`.

        Returns:
            The output of the Linen model.

        Raises:
            ValueError: the batch does not fit the config, or a folded model is in training mode.
        """
        variables = _linen_variables(self)
        if self.deterministic:
            return self.model.apply(variables, pixel_values, **options)
        keys = {"drop_path": self.rngs()} if self.model.config.drop_path_rate else {}
        output, updates = self.model.apply(
            variables, pixel_values, train=True, rngs=keys, mutable=["batch_stats"], **options
        )
        state = nnx.state(self, nnx.BatchStat)
        nnx.replace_by_pure_dict(state, updates.get("batch_stats", {}))
        nnx.update(self, state)
        return output

    def set_view(self, deterministic: bool | None = None) -> None:
        """Set the mode of a view of this module; called by `nnx.view(module, deterministic=...)`.

        Args:
            deterministic: False for training mode; None changes nothing.

        Examples:
            >>> from levit_flax import from_pretrained
            >>> module = to_nnx(*from_pretrained("cifar10"))
            >>> training = nnx.view(module, deterministic=False)  # shares its variables with `module`
            >>> module.deterministic, training.deterministic
            (True, False)
        """
        if deterministic is not None:
            self.deterministic = deterministic


def to_nnx(model: LevitBase, variables: Mapping[str, Any], rngs: nnx.Rngs | nnx.RngStream | None = None) -> LevitNNX:
    """Return an NNX module with the weights of a Linen model.

    Args:
        model: a LeViT model, folded or not.
        variables: its variables, as arrays or `jax.ShapeDtypeStruct`s.
        rngs: provides the stream "drop_path", or a default stream, from which the module forks its own; used in
            training if the config's `drop_path_rate` is above 0. None for `nnx.Rngs(drop_path=0)`.

    Returns:
        The module, in evaluation mode. It shares the arrays, which are immutable, with `variables`.

    Raises:
        ValueError: the variables do not fit the model.

    Examples:
        >>> import jax.numpy as jnp
        >>> from levit_flax import from_pretrained
        >>> module = to_nnx(*from_pretrained("cifar10"))
        >>> nnx.jit(lambda module, x: module(x).logits)(module, jnp.zeros((2, 144, 144, 3))).shape
        (2, 10)
    """
    _check_variables(model, variables, "The tree of variables")
    return LevitNNX(model, variables, nnx.Rngs(drop_path=0) if rngs is None else rngs)


def from_nnx(module: LevitNNX) -> tuple[LevitBase, Variables]:
    """Return the Linen model and the variables of an NNX module.

    Args:
        module: a module made by `to_nnx`, possibly trained since.

    Returns:
        The Linen module and its variables, to fold, save or convert. They share their arrays with `module`.

    Raises:
        TypeError: the module was not made by `to_nnx`.

    Examples:
        >>> from levit_flax import fold_batch_norm, from_pretrained
        >>> module = to_nnx(*from_pretrained("cifar10"))
        >>> model, variables = fold_batch_norm(*from_nnx(module))
        >>> model.folded
        True
    """
    if not isinstance(module, LevitNNX):
        raise TypeError(
            f"The module is not a LeViT: expected a module made by to_nnx, found {type(module).__name__}. Pass the part"
            " of your model that to_nnx returned."
        )
    return module.model, _linen_variables(module)


def _linen_variables(module: LevitNNX) -> Variables:
    """Return the variables of a module as a tree of the Linen model."""
    found = {name: nnx.to_pure_dict(nnx.state(module, kind)) for name, kind in _TYPES.items()}
    return {name: tree for name, tree in found.items() if tree}
