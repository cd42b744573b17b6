import numpy as np
import pytest
import sentences

from compress.models.sentence_modules import Normalize, SentenceModules
from compress.stages.reduce_dimensions import ReduceDimensions
from compress.tasks.inference import predict
from compress.utils.errors import StageError


def test_what_is_left_is_the_leading_part_of_the_embeddings() -> None:
    model = sentences.encoder(SentenceModules(sentences.WIDTH, steps=(Normalize(),)))
    context = sentences.context()
    examples = context.encode("train", model)
    before = predict(model.module, examples).astype(np.float64)
    reduced = ReduceDimensions(dimensions=6).run(model, context)
    after = predict(model.module, context.encode("train", reduced)).astype(np.float64)
    _, _, rows = np.linalg.svd(before, full_matrices=False)
    expected = before @ rows[:6].T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert after.shape == (len(examples), 6)
    # Rows of a decomposition have no sign, so products are compared.
    np.testing.assert_allclose(after @ after.T, expected @ expected.T, atol=1e-4)


@pytest.mark.parametrize("dimensions", [sentences.WIDTH, sentences.WIDTH + 1])
def test_as_many_dimensions_as_there_are_is_refused(dimensions: int) -> None:
    with pytest.raises(StageError, match=f"{dimensions} of {sentences.WIDTH} dimensions"):
        ReduceDimensions(dimensions=dimensions).run(sentences.encoder(), sentences.context())


def test_too_little_text_is_refused() -> None:
    with pytest.raises(StageError, match="12 training texts do not span 20"):
        ReduceDimensions(dimensions=20).run(sentences.encoder(), sentences.context(sentences.dataset(train=6)))
