"""Plans from a transformers model whose routers stay its own: what its experts modules are called with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...core.plan import Plan
from ...core.trail import Key, Record, Trail
from .use import experts_of

__all__ = ["Seen", "load_folder", "watch"]


class Seen:
    """The plans of the forward pass that ran last, by path of the experts module."""

    def __init__(self) -> None:
        self._plans: dict[str, Plan] = {}
        self._scores: dict[str, Tensor] = {}

    def take(self) -> Trail:
        """What was seen since the last call, with demand and load left to be counted from the plans."""
        trail = Trail({Key(path, 0): Record(plan=plan) for path, plan in self._plans.items()})
        self._plans, self._scores = {}, {}
        return trail


@contextlib.contextmanager
def watch(model: nn.Module) -> Iterator[Seen]:
    """`with watch(model) as seen:` every forward pass leaves its plans in `seen`, by forward hooks that are gone after.

    A choice of weight 0 or of an id from the number of experts on is absent (-1): some routers mark what they skip so.
    probs: the router's distribution, where a module beside the experts returns logits [T, E] that the weights follow
    from, by a softmax over all experts or by sigmoids; None elsewhere. Raises `UserError` for a model that has no
    decorated experts, or experts of which nothing can be seen.
    """
    ours, others = experts_of(model)
    if others or not ours:
        what = "; ".join(f"{path} ({why})" for path, why in list(others.items())[:3]) or "it has no routed experts"
        raise UserError(f"{type(model).__name__}: the routing cannot be seen: {what}")
    seen, handles = Seen(), []
    try:
        for path, experts in ours.items():
            parent = path.rpartition(".")[0]
            for name, module in model.get_submodule(parent).named_children():
                if module is not experts and name != "experts":
                    handles.append(module.register_forward_hook(_listen(seen, path, experts)))
            handles.append(experts.register_forward_pre_hook(_note(seen, path), with_kwargs=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _listen(seen: Seen, path: str, experts: Any) -> Any:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        for value in out if isinstance(out, tuple) else (out,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1:] == (experts.num_experts,):
                seen._scores[path] = value.detach().reshape(-1, experts.num_experts)
                return

    return hook


def _note(seen: Seen, path: str) -> Any:
    def hook(module: Any, args: Any, kwargs: Any) -> None:
        given = [*args, *kwargs.values()]
        if len(given) < 3 or given[1].ndim != 2:
            raise UserError(f"{path}: called with {len(given)} arguments, not with units, choices and weights")
        expert, weight = given[1].detach().long(), given[2].detach().float()
        E = module.num_experts
        here = (expert >= 0) & (expert < E) & (weight != 0)
        if path in seen._plans:
            raise UserError(f"{path}: ran twice in one pass; models that share experts are not traced")
        seen._plans[path] = Plan(
            expert=expert.masked_fill(~here, -1),
            weight=weight.masked_fill(~here, 0),
            num_experts=E,
            probs=_distribution(seen._scores.get(path), expert, weight, here),
        )

    return hook


def _distribution(scores: Tensor | None, expert: Tensor, weight: Tensor, here: Tensor) -> Tensor | None:
    """[T, E] what the router chose from, if the weights say which of the usual things it did with its logits."""
    if scores is None or scores.shape[0] != expert.shape[0] or expert.shape[1] < 2 or not bool(here.all()):
        return None
    softmax, sigmoid = scores.float().softmax(-1), scores.float().sigmoid()
    for probs in (softmax, sigmoid / sigmoid.sum(-1, keepdim=True).clamp_min(1e-30)):
        share = weight / probs.gather(1, expert).clamp_min(1e-30)  # one factor per unit, if the weights are these
        if bool(((share - share[:, :1]).abs() <= 2e-2 * share[:, :1].abs()).all()):
            return probs
    return None


def load_folder(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """(model in evaluation mode, its config) of a folder that transformers can read: safetensors only, no code from the
    folder, nothing from the network. Raises `UserError` of one line."""
    import transformers
    from transformers.utils import logging

    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no safetensors file; other formats can run code and are not read")
    logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
            raise UserError(f"{folder}: transformers has no causal language model for {config.model_type!r}")
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, info = loaded
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: transformers cannot read it ({type(error).__name__}: {said})") from None
    lost = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", ())]))
    if lost:
        raise UserError(f"{folder}: {len(lost)} tensors are missing or of another shape ({', '.join(lost[:3])}, ...)")
    return model.eval().to(torch.device(device)), config
