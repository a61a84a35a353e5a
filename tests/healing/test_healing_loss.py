from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from spinecli.healing import loss as healing_loss
from spinecli.healing.config import Loss
from spinecli.healing.loss import divergence, loss_sums
from spinecli.healing.targets import Targets

POSITIONS, WIDTH, VOCABULARY = 37, 6, 11


class Linear(nn.Linear):
    """A head as `loss_sums` asks for it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(WIDTH, VOCABULARY)

    @property
    def vocabulary(self) -> int:
        return VOCABULARY


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def likeliest(logits: Tensor, k: int, temperature: float = 1.0) -> Targets:
    found, tokens = (logits / temperature).log_softmax(dim=-1).topk(k, dim=-1)
    return Targets(tokens, found)


@given(seed=st.integers(0, 1000), spread=st.floats(0.1, 8), temperature=st.floats(0.5, 4))
def test_with_the_whole_vocabulary_it_is_the_divergence_of_pytorch(
    seed: int, spread: float, temperature: float
) -> None:
    teacher, student = spread * drawn(5, VOCABULARY, seed=seed), drawn(5, VOCABULARY, seed=seed + 1)
    ours, theirs = ((each / temperature).log_softmax(dim=-1) for each in (student, teacher))
    expected = functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(dim=-1) * temperature**2
    found = divergence(ours, likeliest(teacher, VOCABULARY, temperature), temperature)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 1000), k=st.integers(1, VOCABULARY))
def test_fewer_tokens_bound_it_from_below_and_equal_models_do_not_differ(seed: int, k: int) -> None:
    teacher, student = 3 * drawn(5, VOCABULARY, seed=seed), drawn(5, VOCABULARY, seed=seed + 1)
    whole = divergence(student.log_softmax(dim=-1), likeliest(teacher, VOCABULARY))
    part = divergence(student.log_softmax(dim=-1), likeliest(teacher, k))
    assert (part <= whole + 1e-4).all()
    assert (part >= -1e-4).all()
    own = divergence(teacher.log_softmax(dim=-1), likeliest(teacher, k))
    torch.testing.assert_close(own, torch.zeros(5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("loss", list(Loss))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chunks_give_the_losses_and_gradients_of_the_whole(
    loss: Loss, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing_loss, "LOGIT_BYTES", 16 * 4 * VOCABULARY)  # 16 positions at a time, of 37
    head, hidden = Linear(), drawn(POSITIONS, WIDTH).requires_grad_()
    following = torch.arange(POSITIONS) % VOCABULARY
    targets = likeliest(3 * drawn(POSITIONS, VOCABULARY, seed=3), 4, temperature)
    found = loss_sums(hidden, head, following, targets, loss, temperature, scale=1 / POSITIONS)
    assert hidden.grad is not None
    assert head.weight.grad is not None
    gradients = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = head.bias.grad = None

    logits = head(hidden)
    lm = functional.cross_entropy(logits, following)
    kl = divergence((logits / temperature).log_softmax(dim=-1), targets, temperature).mean()
    expected = {Loss.kl: kl, Loss.lm: lm, Loss.both: kl + lm}[loss]
    expected.backward()  # type: ignore[no-untyped-call]
    assert found.of(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert found.of(Loss.lm) == pytest.approx(float(lm.detach()), rel=1e-5)
    torch.testing.assert_close(gradients[0], hidden.grad)
    torch.testing.assert_close(gradients[1], head.weight.grad)


def test_a_certain_teacher_leaves_finite_gradients() -> None:
    head, hidden = Linear(), drawn(4, WIDTH).requires_grad_()
    certain = likeliest(torch.eye(VOCABULARY)[:4] * 200, 2)
    loss_sums(hidden, head, torch.zeros(4, dtype=torch.int64), certain, Loss.kl, 1.0, scale=1.0)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
