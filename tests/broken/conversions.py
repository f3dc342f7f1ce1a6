"""Failure 6: conversions that leave weights random, share tensors with their source, or lie on the receipt."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn

from moestro.convert.config import BranchTrainMix, Copy
from moestro.convert.receipt import checksums

OPTIONS = Copy(num_experts=2)


def honest(model: nn.Module, text):
    return OPTIONS.build(model, text=text)


def _measured_anew(old, new, receipt, text):
    """The receipt with a true difference and true checksums: only the weights are wrong."""
    with torch.no_grad():
        want, got = old(text)[0].double(), new(text)[0].double()
    measured = dataclasses.replace(receipt.measured, relative=float((got - want).norm() / want.norm()))
    return dataclasses.replace(receipt, measured=measured, exact=None, bound=None, checksums=checksums(new))


def leaves_random(model: nn.Module, text):
    """One expert's matrix is never copied: it keeps what the constructor drew."""
    new, receipt = honest(model, text)
    with torch.no_grad():
        new.layers[1].ffn.experts.down[1].normal_(std=0.02)
    return new, _measured_anew(model, new, receipt, text)


def leaves_initial(model: nn.Module, text):
    """The same, where the constructor's values come from a seed: two conversions agree, and it is still no copy."""
    new, receipt = honest(model, text)
    with torch.no_grad():
        torch.manual_seed(0)
        new.layers[1].ffn.experts.down[1].normal_(std=0.02)
    return new, _measured_anew(model, new, receipt, text)


def copies_references(model: nn.Module, text):
    """The attention of the new model is that of the old one: training one trains the other."""
    new, receipt = honest(model, text)
    new.layers[0].mixer = model.layers[0].mixer
    return new, receipt


def changes_the_old(model: nn.Module, text):
    """Scales the old model's head in place on the way."""
    with torch.no_grad():
        model.head.weight.mul_(1.001)
    return honest(model, text)


def lies_about_the_difference(model: nn.Module, text):
    """Half of a layer is gone, the receipt still says that nothing happened."""
    new, receipt = honest(model, text)
    with torch.no_grad():
        new.layers[0].ffn.experts.down.mul_(0.5)
    return new, dataclasses.replace(receipt, checksums=checksums(new))


def lies_about_checksums(model: nn.Module, text):
    """Swaps two neurons of every expert, which changes no output, after the checksums were taken."""
    new, receipt = honest(model, text)
    with torch.no_grad():
        up, down = new.layers[0].ffn.experts.gate_up, new.layers[0].ffn.experts.down
        F = down.shape[2]
        order = torch.arange(F)
        order[:2] = torch.tensor([1, 0])
        up.copy_(up[:, torch.cat([order, F + order])].clone())
        down.copy_(down[:, :, order].clone())
    return new, receipt


def ignores_a_source(models, text):
    """Expert 2 is a copy of source 1, and source 2 is in no mean: a mixture like any other, of two models."""
    given = [models[0], models[1], copy.deepcopy(models[1])]
    new, receipt = BranchTrainMix().build(given, text=text)
    with torch.no_grad():
        want, got = torch.stack([m(text)[0].double() for m in models]).mean(0), new(text)[0].double()
    measured = dataclasses.replace(receipt.measured, relative=float((got - want).norm() / want.norm()))
    return new, dataclasses.replace(receipt, measured=measured)
