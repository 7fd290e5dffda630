"""The PyTorch kernels on a CUDA or ROCm device: right, deterministic, never waiting for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_port.kernels import eager as kernels
from nsa_port.kernels.geometry import Layout
from tests.eager_cases import (
    CASES,
    Case,
    assert_close,
    make_inputs,
    no_waiting,
    reference_run,
)

eager: Any = kernels  # arguments are spread from lists below

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on_device(layout: Layout) -> Layout:
    cu_q, cu_k, positions = (
        None if x is None else x.cuda()
        for x in (layout.cu_seqlens, layout.cu_seqlens_k, layout.positions)
    )
    return Layout(layout.num_keys, cu_q, cu_k, positions)


def run(case: Case, tensors: list[Tensor], grad: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
    tail = (case.config, on_device(case.layout), case.scale)
    with no_waiting():
        whole = eager.nsa_attention(*tensors, *tail, True)
        grads = eager.nsa_attention_backward(grad, *tensors, whole, *tail)
    return whole, grads


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_whole_matches_the_reference_without_waiting(case: Case) -> None:
    x = make_inputs(case)
    tensors = x.tensors()
    device_tensors = [tensor.cuda() for tensor in tensors]
    whole, found = run(case, device_tensors, x.grad.cuda())
    again, found_again = run(case, device_tensors, x.grad.cuda())
    assert torch.equal(whole.out, again.out)
    assert all(torch.equal(a, b) for a, b in zip(found, found_again, strict=True))
    exact, exact_grads = reference_run("nsa_attention", case, tensors, (x.grad,), wide=True)
    plain, plain_grads = reference_run("nsa_attention", case, tensors, (x.grad,), wide=False)
    assert_close(whole.out.cpu(), exact[0], plain[0], "out")
    for what, *values in zip(x.names, found, exact_grads, plain_grads, strict=True):
        actual = values[0].cpu()
        assert_close(actual, values[1], values[2], f"d{what}", source=x.grad, lse=whole.lse.cpu())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mean_compress_does_not_wait(case: Case) -> None:
    x = make_inputs(case)
    layout, blocks = on_device(case.layout), x.k_cmp.shape[1]
    keys, grad = x.k_slc.cuda(), x.k_cmp.cuda()
    with no_waiting():
        y = eager.mean_compress(keys, case.config, layout, blocks)
        dx = eager.mean_compress_backward(grad, case.config, layout)
    torch.testing.assert_close(
        y.cpu(), eager.mean_compress(x.k_slc, case.config, case.layout, blocks)
    )
    torch.testing.assert_close(
        dx.cpu(), eager.mean_compress_backward(x.k_cmp, case.config, case.layout)
    )
