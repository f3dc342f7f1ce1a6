"""Mixtures of LoRA experts on linear maps, with a number of experts per layer."""
