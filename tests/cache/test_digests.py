"""Contents of tensors are told apart, by sums that are those of whole numbers."""

from __future__ import annotations

import pytest
import torch

from lora_da.cache.digests import CHUNK, ROW, Digests

SIZES = (1, 2, 3, 4, 5, 7, 8, 4 * ROW - 1, 4 * ROW, 4 * ROW + 1, 8 * ROW + 6, 4 * CHUNK + 4)


@pytest.mark.parametrize("size", SIZES)
def test_the_sums_are_those_of_whole_numbers(size):
    """Python's own, which know no end, taken at 64 bits."""
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    digests = Digests()
    *sums, rest = digests._sums(raw)
    multipliers = [m % 2**64 for m in digests._multipliers[torch.device("cpu")].tolist()]
    numbers = raw[: size // 4 * 4].view(torch.int32).tolist()
    rows = [numbers[start : start + ROW] for start in range(0, len(numbers), ROW)]
    expected = [sum(n * m for n, m in zip(row, multipliers, strict=False)) % 2**64 for row in rows]
    found = [s % 2**64 for part in sums for s in part.tolist()]
    # A chunk ends with the sum of what fills no row, be it of nothing.
    assert [s for s in found if s] == [e for e in expected if e]
    assert rest.tolist() == raw[size // 4 * 4 :].tolist()


def test_multipliers_are_odd_and_no_two_differ_by_a_multiple_of_a_word():
    multipliers = Digests()._multipliers[torch.device("cpu")].tolist()
    assert all(m % 2 for m in multipliers)
    assert len({m % 2**32 for m in multipliers}) == len(multipliers) == ROW
    assert CHUNK % ROW == 0


def of_every_kind():
    numbers = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    yield from (numbers, numbers.T, numbers[0, 0], numbers[:0], numbers.reshape(-1), numbers.view(48, 64))
    yield from (numbers.to(d) for d in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn))
    yield from (numbers > 0, numbers.to(torch.complex64), -numbers, numbers[1:], numbers + 1e-6)


def test_digests_tell_dtypes_shapes_and_contents_apart():
    tensors = list(of_every_kind())
    assert len({Digests().digest(t) for t in tensors}) == len(tensors)
    assert [Digests().digest(t) for t in tensors] == [Digests().digest(t.clone()) for t in tensors]


def test_a_digest_is_of_the_content_wherever_it_lies():
    numbers = torch.randn(64, 48)
    strided = torch.empty(48, 64).T
    strided.copy_(numbers)
    assert not strided.is_contiguous()
    shifted = torch.empty(numbers.numel() * 4 + 1, dtype=torch.uint8)[1:]
    shifted.copy_(numbers.view(-1).view(torch.uint8))
    assert shifted.storage_offset() == 1
    assert Digests().digest(strided) == Digests().digest(numbers)
    assert Digests().digest(shifted) == Digests().digest(numbers.view(-1).view(torch.uint8))


@pytest.mark.parametrize("places", [(0, 1), (0, ROW), (5, 3 * ROW + 5), (ROW - 1, ROW)])
def test_words_and_rows_that_change_places_are_told(places):
    words = torch.randint(-(2**31), 2**31, (4 * ROW,), dtype=torch.int32)
    words[places[1]] = words[places[0]] ^ -(2**31)  # the hardest: they differ in the topmost bit
    swapped = words.clone()
    swapped[list(places)] = words[list(reversed(places))]
    turned = words.clone()
    turned[list(places)] ^= -(2**31)
    rows = words.view(4, ROW)[[1, 0, 2, 3]].reshape(-1)
    assert len({Digests().digest(t) for t in (words, swapped, turned, rows)}) == 4 - torch.equal(swapped, turned)


def test_a_tensor_made_of_others_is_told_by_them():
    from torch.testing._internal.two_tensor import TwoTensor

    one, other = torch.ones(3), torch.zeros(3)
    digests = [Digests().digest(TwoTensor(a, b)) for a, b in ((one, other), (other, one), (one, one))]
    assert len({*digests, Digests().digest(one)}) == 4
    assert Digests().digest(TwoTensor(one.clone(), other.clone())) == digests[0]
