"""PyTorch's transformer layers look at the masks that they are given."""

import pytest
import torch
from torch import nn

import fxzip

MASKS = {
    "buffer": lambda net, size: net.mask[:size, :size],
    "made": lambda net, size: nn.Transformer.generate_square_subsequent_mask(size),
    "booleans": lambda net, size: torch.ones(size, size, dtype=torch.bool).triu(1),
    "not causal": lambda net, size: torch.full((size, size), -1.0).triu(2),
}


class Sequences(nn.Module):
    """A model of sequences as tutorials write it; `decoding`: its layers read the embedded words as well."""

    def __init__(self, mask, decoding, classes=3):
        super().__init__()
        self.how, self.words, self.head = MASKS[mask], nn.Embedding(20, 12), nn.Linear(12, classes)
        kind, many = (nn.TransformerDecoderLayer, nn.TransformerDecoder) if decoding else (
            nn.TransformerEncoderLayer, nn.TransformerEncoder
        )  # fmt: skip
        self.layers, self.decoding = many(kind(12, 2, 16, batch_first=True), 1), decoding
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(9), persistent=False)

    def forward(self, words):
        h, mask = self.words(words), self.how(self, words.shape[1])
        return self.head(self.layers(h, 2 * h, tgt_mask=mask) if self.decoding else self.layers(h, mask=mask))


@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("mask", sorted(MASKS))
@pytest.mark.thinned(3)
def test_masks_of_transformer_layers_are_followed(mask, decoding):
    torch.manual_seed(0)
    model, words = Sequences(mask, decoding).eval(), torch.randint(0, 20, (8, 6))
    twin = fxzip.relabel(model, words)
    zipped = fxzip.compile_zip(model, twin, words, method="permute", refit=None, progress=False)
    assert zipped.report["spaces"]
    for given in (words, words[:3], words[:, :4]):
        for found in zipped(given):
            torch.testing.assert_close(found, model(given), rtol=1e-4, atol=1e-5)


def test_layers_ask_as_ever_afterwards():
    before = nn.modules.transformer._detect_is_causal_mask, nn.functional._none_or_dtype
    fxzip.tracing.trace(Sequences("made", False).eval(), torch.randint(0, 20, (8, 6)))
    assert before == (nn.modules.transformer._detect_is_causal_mask, nn.functional._none_or_dtype)
