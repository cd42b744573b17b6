import numpy as np
import pytest

from compress.numerics.embeddings import principal_rotation, retained_share


def test_what_is_kept_is_what_the_largest_singular_values_hold() -> None:
    generator = np.random.default_rng(0)
    embeddings = (generator.normal(size=(50, 8)) * [9, 1, 5, 1, 1, 3, 1, 1] + 2).astype(np.float32)
    values = np.linalg.svd(embeddings.astype(np.float64), compute_uv=False) ** 2
    for dimensions in (1, 3, 8):
        rotation = principal_rotation(embeddings, dimensions)
        assert retained_share(embeddings, rotation) == pytest.approx(values[:dimensions].sum() / values.sum(), rel=1e-5)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(dimensions), atol=1e-6)


def test_all_dimensions_keep_every_product() -> None:
    embeddings = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    rotated = embeddings @ principal_rotation(embeddings, 6).T
    np.testing.assert_allclose(rotated @ rotated.T, embeddings @ embeddings.T, atol=1e-4)


def test_rows_are_signed_by_their_largest_entry() -> None:
    assert (principal_rotation(-np.eye(4, 3, dtype=np.float32), 3).max(axis=1) > 0.99).all()


@pytest.mark.parametrize(("dimensions", "words"), [(9, "9 of 8 dimensions"), (0, "0 of 8"), (7, "5 embeddings do not")])
def test_more_than_there_are_cannot_be_kept(dimensions: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        principal_rotation(np.ones((5, 8), np.float32), dimensions)
