import torch

from gramian.observe.tokens import first_tokens, split_first

MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])


def by_hand() -> torch.Tensor:
    first = torch.zeros(MASK.shape, dtype=torch.bool)
    for row, values in enumerate(MASK.tolist()):
        if 1 in values:
            first[row, values.index(1)] = True
    return first


def test_the_first_token_is_the_first_real_one():
    assert torch.equal(first_tokens(MASK), by_hand())
    assert torch.equal(first_tokens(MASK.bool()), by_hand())
    column = torch.zeros(MASK.shape, dtype=torch.bool)
    column[:, 0] = MASK[:, 0] == 1
    assert not torch.equal(first_tokens(MASK), column)  # control: column 0


def test_a_mask_is_split_in_two_that_sum_to_it():
    for mask in (MASK, MASK.bool(), MASK.double()):
        first, rest = split_first(mask)
        assert first.dtype == rest.dtype == mask.dtype
        assert torch.equal(first + rest, mask)
        assert torch.equal(first != 0, by_hand())
        assert not ((first != 0) & (rest != 0)).any()
