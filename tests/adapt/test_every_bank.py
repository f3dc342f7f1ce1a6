"""Every registered bank either takes adapters and passes the suite for banks with them, or says why not."""

from __future__ import annotations

import pytest
import torch

from moestro.adapt import LoRA
from moestro.adapt.lora.bank import LoRABank, adaptable
from moestro.core.errors import UserError
from moestro.experts.config import examples
from moestro.testing.experts import check_experts

TAKE = {"gated", "gated_gelu", "mlp", "mlp_bias", "mlp_relu2", "mlp_leaky", "mlp_alike"}


@pytest.mark.parametrize("name", examples())
def test_bank(name: str) -> None:
    def source():
        return examples()[name].build(dim=16, num_experts=4)

    able, why = adaptable(source())
    assert able == (name in TAKE), why
    if not able:
        with pytest.raises(UserError, match=r"^LoRA on a bank: .+"):
            LoRABank(source(), LoRA())
        return

    def make() -> LoRABank:
        bank = LoRABank(source(), LoRA(rank=2))
        with torch.no_grad():
            for p in bank.parameters():
                if p.requires_grad:
                    p.normal_(std=0.3)
        return bank

    check_experts(make, num_experts=4)
