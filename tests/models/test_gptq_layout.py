"""The bit streams of the AutoGPTQ layout, against words packed by hand and a stream written by Python's integers."""

import pytest
import torch
from quantized import quantize_tiny_llama, rounded, save_tiny_llama

from compress.models.gptq_layout import pack_bits, pack_layer, unpack_bits, unpack_layer
from compress.utils.errors import ModelError


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_a_column_is_one_stream_of_bits(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    values = torch.randint(0, 1 << bits, (64, 5), generator=generator)
    words = pack_bits(values, bits)
    for column in range(5):
        stream = sum(int(value) << (bits * position) for position, value in enumerate(values[:, column]))
        expected = [stream >> (32 * position) & 0xFFFFFFFF for position in range(2 * bits)]
        assert [int(word) & 0xFFFFFFFF for word in words[:, column]] == expected
    assert torch.equal(unpack_bits(words, bits), values.to(torch.uint8))


def test_three_bits_cross_the_words_as_in_autogptq() -> None:
    # AutoGPTQ's own packing of 32 values: ten, one split 2 + 1, ten, one split 1 + 2, ten.
    values = [(7 * index + 3) % 8 for index in range(32)]
    first = sum(values[j] << (3 * j) for j in range(10)) | (values[10] & 3) << 30
    second = values[10] >> 2 | sum(values[11 + j] << (3 * j + 1) for j in range(10)) | (values[21] & 1) << 31
    third = values[21] >> 1 | sum(values[22 + j] << (3 * j + 2) for j in range(10))
    words = pack_bits(torch.tensor(values)[:, None], 3)
    assert [int(word) & 0xFFFFFFFF for word in words[:, 0]] == [first, second, third]


@pytest.mark.parametrize("less_one", [True, False])
def test_a_layer_comes_back_whole(less_one: bool) -> None:
    weight = rounded(torch.randn(64, 96, generator=torch.Generator().manual_seed(1)), 4, 32)
    back = unpack_layer(pack_layer(weight, less_one), 4, 32, less_one)
    assert torch.equal(back.integers, weight.integers)
    assert torch.equal(back.scales, weight.scales)
    assert torch.equal(back.zero_points, weight.zero_points)
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_zero_points_of_the_first_format_are_stored_less_one() -> None:
    weight = rounded(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)), 4, 32)
    assert {int(word) & 0xFFFFFFFF for word in pack_layer(weight, True)["qzeros"].flatten()} == {0x77777777}
    assert {int(word) & 0xFFFFFFFF for word in pack_layer(weight, False)["qzeros"].flatten()} == {0x88888888}


def test_a_width_that_fills_no_word_is_refused() -> None:
    with pytest.raises(ModelError, match="40 x 32"):
        pack_layer(rounded(torch.ones(40, 32), 4, 32), True)


def test_a_checkpoint_reads_its_integers_back(tmp_path) -> None:
    source = save_tiny_llama(tmp_path / "source")
    quantized = quantize_tiny_llama(source, tmp_path / "quantized")
    module = "model.layers.1.mlp.down_proj"
    expected = rounded(source.weight(module), 4, 32)
    assert torch.equal(quantized.weight(module), expected.dequantize())
    table = quantized.quantized("model.embed_tokens")
    assert table is not None
    assert table.integers.shape == (160, 64)
    assert torch.equal(table.dequantize(), rounded(source.weight("model.embed_tokens"), 4, 32).dequantize())
    assert quantized.quantized("model.norm") is None
