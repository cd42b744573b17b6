import numpy as np
import pytest
import torch

from compress.numerics.next_token import (
    divergence,
    log_probabilities,
    loop_length,
    negative_log_likelihood,
    repeated_share,
)


def logits(rows: int, vocabulary: int, seed: int = 0, scale: float = 5.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, vocabulary)) * scale).astype(np.float32)


def test_losses_are_torchs_over_several_chunks():
    given, tokens = logits(150, 33), np.random.default_rng(1).integers(0, 33, 150)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(given).double(), torch.from_numpy(tokens), reduction="none"
    )
    assert negative_log_likelihood(given, tokens) == pytest.approx(expected.numpy(), rel=1e-12)


def test_large_logits_do_not_overflow():
    given = np.array([[1e4, 0.0], [0.0, 1e4]], np.float32)
    assert negative_log_likelihood(given, np.array([0, 0])).tolist() == [0.0, 1e4]
    assert log_probabilities(given)[0].tolist() == [0.0, -1e4]


def test_divergence_is_torchs():
    item, other = logits(9, 40), logits(9, 40, seed=1)
    actual = divergence(log_probabilities(item), log_probabilities(other))
    expected = torch.nn.functional.kl_div(
        torch.from_numpy(other).double().log_softmax(-1),
        torch.from_numpy(item).double().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    assert actual == pytest.approx(expected.numpy(), rel=1e-9)


def test_divergence_of_rounded_distributions_is_never_negative():
    """Rounded to float16, the probabilities of a row do not sum to 1 by themselves."""
    rounded = log_probabilities(logits(200, 500)).astype(np.float16)
    near = log_probabilities(logits(200, 500) + logits(200, 500, 1, 1e-3)).astype(np.float16)
    assert (divergence(rounded, near) >= 0).all()
    assert divergence(rounded, rounded).tolist() == [0.0] * 200


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abcdefgh", 0.0),
        ("abcdabcd", 1 / 5),  # abcd bcda cdab dabc abcd
        ("aaaaaaaa", 4 / 5),
        ("abababab", 3 / 5),
        ("abc", 0.0),
        ("", 0.0),
    ],
)
def test_repeated_share(text, expected):
    assert repeated_share(np.array([ord(letter) for letter in text])) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("beginning, then " + "abcde" * 4, 5),
        ("abcde" * 3 + "abcdf", 0),
        ("x" * 15, 0),  # too short to be sure
        ("x" * 16, 1),
        ("It is so. " * 2, 10),
        ("It is so. " * 2 + "And", 0),  # it got out
        ("abab" * 4, 2),
        ("once again, he says: " * 2, 21),
        ("", 0),
    ],
)
def test_a_loop_is_what_goes_round_at_the_end(text, expected):
    assert loop_length(np.array([ord(letter) for letter in text])) == expected
