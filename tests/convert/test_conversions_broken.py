"""Wrong conversions run without an error, and the check rejects each with the right reason."""

from __future__ import annotations

import pytest
import torch

from broken import conversions as broken
from moestro.models.examples import examples as decoders
from moestro.testing.conversions import check_conversion

TEXT = torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("convert", "reason"),
    [
        (broken.leaves_random, r"left random: layers\.1\.ffn\.experts\.down"),
        (broken.leaves_initial, r"left without a source: layers\.1\.ffn\.experts\.down\[1\]"),
        (broken.copies_references, "training one changes the other"),
        (broken.changes_the_old, "the old model has changed: head.weight"),
        (broken.lies_about_the_difference, "the receipt lies: it says the outputs differ by"),
        (broken.lies_about_checksums, "its checksums are not those of the new model"),
    ],
)
def test_6_a_conversion_that_is_wrong(convert, reason):
    make = decoders()["moe"].replace(moe=None).build
    with pytest.raises(AssertionError, match=reason):
        check_conversion(lambda model: convert(model, TEXT), make, lambda model: model(TEXT)[0])


def test_6_a_mixture_that_leaves_a_source_out():
    config = decoders()["moe"].replace(moe=None)
    with pytest.raises(AssertionError, match=r"does not depend on model 2 of 3"):
        check_conversion(
            lambda models: broken.ignores_a_source(models, TEXT),
            lambda: [config.build() for _ in range(3)],
            lambda model: model(TEXT)[0],
        )


def test_an_honest_conversion_passes():
    make = decoders()["moe"].replace(moe=None).build
    check_conversion(lambda model: broken.honest(model, TEXT), make, lambda model: model(TEXT)[0], exact=1e-6)
