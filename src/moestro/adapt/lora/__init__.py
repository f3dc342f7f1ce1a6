"""LoRA: frozen weights and low-rank factors beside them, for banks of experts and for linear maps."""
