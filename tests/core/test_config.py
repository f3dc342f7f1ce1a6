"""Configs: round trip, named errors, no torch at import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moestro.core.errors import UserError
from moestro.moe.config import MoELayer
from moestro.routers.config import Linear, Renormalised, Router, TopK


def test_round_trip_through_json():
    config = MoELayer(
        num_experts=5, router=Router(score=Linear(bias=True), select=TopK(k=3), weigh=Renormalised(scale=2))
    )
    assert MoELayer.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_expert": 3}, r"no field 'num_expert' \(did you mean 'num_experts'\?\)"),
        ({"num_experts": "many"}, r"config\.num_experts: expected int, found 'many'"),
        ({"num_experts": True}, "expected int"),
        ({"experts": {"type": "moe.Blend"}}, "unknown config type 'moe.Blend'"),
        ({"shared": {"type": "experts.Gated", "widht": 3}}, r"config\.shared: Gated has no field 'widht'"),
        ({"router": {"type": "routers.Ruter"}}, r"unknown config type 'routers.Ruter' \(did you mean"),
        ({"router": {"type": "routers.TopK"}}, "TopK is no AnyRouter"),
        ({"router": 3}, "expected an object"),
        ({"router": {"type": "os.system"}}, "unknown config type"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(change, says):
    with pytest.raises(UserError, match=says):
        MoELayer.from_dict(MoELayer().to_dict() | change)


def test_configs_load_no_torch():
    code = "import sys, moestro.moe.config, moestro.routers.config; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
