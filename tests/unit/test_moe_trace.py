"""Routing traces: what is refused, and that the file holds what was recorded."""

from __future__ import annotations

import pytest
import torch

from moe.record.trace import RoutingTrace, check_routes, compact, compact_dtype

CU = torch.tensor([0, 2, 3])


def routes(dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """[3, 2, 2] over 4 experts."""
    return torch.tensor([[[0, 1], [3, 2]], [[2, 1], [0, 3]], [[3, 0], [1, 2]]], dtype=dtype)


def test_a_file_holds_routes_margins_and_gates(tmp_path):
    margins, gates = torch.rand(3, 2), torch.rand(3, 2, 2)
    RoutingTrace(routes(torch.int64), margins, gates, 4, CU).save(tmp_path / "t.safetensors")
    read = RoutingTrace.load(tmp_path / "t.safetensors")
    assert read.expert_ids.dtype == torch.uint8 and torch.equal(read.expert_ids, routes())
    assert torch.equal(read.margins, margins) and torch.equal(read.gates, gates) and torch.equal(read.cu_seqlens, CU)
    assert read.num_experts == 4
    RoutingTrace(routes(), None, None, 4, CU).save(tmp_path / "bare.safetensors")
    assert RoutingTrace.load(tmp_path / "bare.safetensors").margins is None


def test_three_hundred_experts_take_two_bytes(tmp_path):
    ids = torch.tensor([[[299, 256]]])
    assert compact_dtype(256) == torch.uint8 and compact_dtype(257) == torch.uint16
    trace = RoutingTrace(ids, None, None, 300, torch.tensor([0, 1]))
    trace.save(tmp_path / "t.safetensors")
    read = RoutingTrace.load(tmp_path / "t.safetensors").expert_ids
    assert read.dtype == torch.uint16 and read.tolist() == [[[299, 256]]]
    with pytest.raises(ValueError, match="300 experts do not fit torch.uint8"):
        check_routes(ids.to(torch.uint8), 300)  # 299 has become 43
    with pytest.raises(ValueError, match="65536"):
        compact_dtype(70000)


def test_bytes_a_token():
    """48 layers x top-8 of 128 experts: 384 bytes."""
    ids = torch.arange(8).expand(1, 48, 8)
    assert RoutingTrace(ids, None, None, 128, torch.tensor([0, 1])).bytes_per_token == 384
    assert RoutingTrace(ids, None, None, 512, torch.tensor([0, 1])).bytes_per_token == 768


@pytest.mark.parametrize(
    "route, message",
    [
        ([4, 1], "token 1 in MoE layer 0 names expert 4; experts are 0..3"),
        ([-1, 1], r"token 1 in MoE layer 0 is missing \(-1\)"),
        ([2, 2], r"the route \[2, 2\] of token 1 in MoE layer 0 names an expert twice"),
        ([0, 0], "of token 1 in MoE layer 0 is all zero, as where nothing was recorded"),
    ],
)
def test_impossible_routes_are_refused(route, message):
    ids = routes(torch.int64)
    ids[1, 0] = torch.tensor(route)
    with pytest.raises(ValueError, match=message):
        RoutingTrace(ids, None, None, 4, CU)


def test_an_id_that_a_byte_cannot_hold_is_refused_before_it_becomes_another():
    with pytest.raises(ValueError, match="names expert 257"):
        compact(torch.tensor([[[257, 0]]]), 256)


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"margins has shape \(3,\)"):
        RoutingTrace(routes(), torch.zeros(3), None, 4, CU)
    with pytest.raises(ValueError, match="cu_seqlens"):
        RoutingTrace(routes(), None, None, 4, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="integers"):
        check_routes(torch.rand(3, 2, 2), 4)
    (tmp_path / "no.safetensors").write_text("no trace")
    with pytest.raises(ValueError, match="is not a routing trace"):
        RoutingTrace.load(tmp_path / "no.safetensors")
