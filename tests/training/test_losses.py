"""The losses, compared with PyTorch, transformers and timm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")

import torch
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from levit_flax import LevitConfig
from levit_flax.training.losses import _SINGLE_LABEL, _distillation_loss, _label_loss, _soft_targets
from oracles import torch_config

pytestmark = pytest.mark.usefixtures("standard_promotion")

LOSS_LIMIT = 1e-5  # float32, relative
FLOAT32_ROUNDING = 1e-6  # a few operations


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_distillation_equals_the_reference(temperature):
    generator = np.random.default_rng(0)
    student, teacher_logits = generator.standard_normal((2, 6, 5)).astype(np.float32) * 3
    leaf = torch.from_numpy(student).requires_grad_()
    wanted = (
        torch.nn.functional.kl_div(
            torch.nn.functional.log_softmax(leaf / temperature, 1),
            torch.nn.functional.log_softmax(torch.from_numpy(teacher_logits) / temperature, 1),
            reduction="sum",
            log_target=True,
        )
        * temperature**2
        / leaf.numel()
    )
    wanted.backward()
    loss, (gradient, teachers) = jax.value_and_grad(_distillation_loss, argnums=(0, 1))(
        student, teacher_logits, "soft", temperature
    )
    assert float(loss) == pytest.approx(wanted.item(), rel=FLOAT32_ROUNDING)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=LOSS_LIMIT, atol=1e-7)
    assert not teachers.any()


def test_hard_distillation_is_cross_entropy_with_the_teachers_class():
    generator = np.random.default_rng(0)
    student, teacher_logits = generator.standard_normal((2, 6, 5)).astype(np.float32)
    wanted = torch.nn.functional.cross_entropy(torch.from_numpy(student), torch.from_numpy(teacher_logits).argmax(1))
    loss = _distillation_loss(student, teacher_logits, "hard")
    assert float(loss) == pytest.approx(wanted.item(), rel=FLOAT32_ROUNDING)


@pytest.mark.parametrize("num_labels", [1, 4])
@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_losses_of_other_problem_types_equal_transformers(problem_type, num_labels):
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((6, num_labels)).astype(np.float32)
    targets = generator.integers(0, 2, (6, num_labels)).astype(np.float32)
    if problem_type == "regression":
        targets = generator.standard_normal((6, num_labels)).astype(np.float32)
    config = torch_config(LevitConfig(num_labels=num_labels, problem_type=problem_type))
    wanted = ForSequenceClassificationLoss(torch.from_numpy(targets), torch.from_numpy(logits), config)
    assert float(_label_loss(logits, targets, problem_type)) == pytest.approx(wanted.item(), rel=FLOAT32_ROUNDING)


def test_smoothed_targets_and_their_loss_equal_timm():
    labels = np.array([0, 3, 3, 1, 2, 4])
    wanted = mixup_target(torch.from_numpy(labels), 5, lam=1.0, smoothing=0.1)
    targets = _soft_targets(labels, 5, 0.1, jnp.float32)
    np.testing.assert_allclose(targets, wanted.numpy(), rtol=FLOAT32_ROUNDING)
    np.testing.assert_allclose(targets.sum(-1), 1, rtol=FLOAT32_ROUNDING)
    logits = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    loss = SoftTargetCrossEntropy()(torch.from_numpy(logits), wanted)
    assert float(_label_loss(logits, targets, _SINGLE_LABEL)) == pytest.approx(loss.item(), rel=FLOAT32_ROUNDING)
