"""Adapters on weights that tensor parallelism spreads: placements, losses as of one process, files of whole tensors."""

from __future__ import annotations

import copy
import os
import socket

import methods
import pytest
import torch
import torch.distributed as dist
from small_models import MLP
from torch import nn

import fxgraft as fg

TARGETS = ["up", "down"]
STEPS = 5


def base():
    torch.manual_seed(0)
    return MLP((8, 12, 6, 3), bias=True)


def parallel(model, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def adapted(model, method, train=("head",)):
    torch.manual_seed(1)
    return methods.graft(model, fg.Spec(method, TARGETS, train=list(train)))


def data():
    generator = torch.Generator().manual_seed(9)
    return torch.randn(16, 8, generator=generator), torch.randn(16, 3, generator=generator)


def losses(model):
    x, y = data()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, foreach=False)
    curve = []
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(loss.detach()))
    return torch.tensor(curve)


def check_method(name, method, mesh, folder):
    one = adapted(base(), method)
    expected = losses(one)
    many = adapted(parallel(base(), mesh), method)
    plain = parallel(base(), mesh)
    x, _ = data()
    with fg.disabled(many):
        assert torch.equal(many(x), plain(x)), name
    torch.testing.assert_close(losses(many), expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
    assert expected[-1] < expected[0], name
    with torch.no_grad():
        torch.testing.assert_close(many(x), one(x), rtol=1e-3, atol=1e-4)
    fg.save_adapter(many, f"{folder}/{name}")
    whole = fg.load_adapter(base(), f"{folder}/{name}")
    again = fg.load_adapter(parallel(base(), mesh), f"{folder}/{name}")
    with torch.no_grad():
        torch.testing.assert_close(whole(x), many(x))
        torch.testing.assert_close(again(x), many(x))
    fg.swap(again, one)
    torch.testing.assert_close(again(x), one(x))


def check_placements(mesh):
    from torch.distributed.tensor import Replicate, Shard

    model = adapted(parallel(base(), mesh), fg.LoRA(rank=2), train=())
    up, down = model.up.fxgraft.default, model.down.fxgraft.default
    assert up.A.placements == (Replicate(),) and up.B.placements == (Shard(0),)
    assert down.A.placements == (Shard(1),) and down.B.placements == (Replicate(),)
    assert tuple(up.B.to_local().shape) == (6, 2) and tuple(down.A.to_local().shape) == (2, 6)
    square = nn.Sequential(nn.Linear(8, 8))  # sizes do not tell the dimensions apart here, roles do
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    square = fg.rewrite(parallelize_module(square, mesh, {"0": RowwiseParallel()}), fg.Spec(fg.LoRA(rank=8), ["0"]))
    held = square[0].fxgraft.default
    assert held.A.placements == (Shard(1),) and held.B.placements == (Replicate(),)


def check_refusals(mesh):
    model = parallel(base(), mesh)
    with pytest.raises(fg.SpecError, match=r"part of a fused weight.*device mesh.*Exclude it"):
        fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), [fg.Target("up", parts=3, select=(0,))]))
    with pytest.raises(fg.SpecError, match=r"UniLoRA has tensors that all sites share.*'head' is not on the same"):
        fg.rewrite(model, fg.Spec(fg.UniLoRA(rank=2, vector_length=20), ["up", "head"]))
    assert not any("fxgraft" in name for name, _ in model.named_modules())
    with pytest.raises(fg.FxgraftError):
        fg.merge(adapted(model, fg.LoRA(rank=2)))


def check_fsdp2_in_mixed_precision():
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    expected = losses(adapted(base(), fg.LoRA(rank=2)))
    model = adapted(base(), fg.LoRA(rank=2))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    for layer in (model.up, model.down, model.head):
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    torch.testing.assert_close(losses(model), expected, rtol=2e-2, atol=2e-2)  # eight bits of mantissa
    assert all(p.dtype == torch.float32 for p in model.parameters())
    state = fg.adapter_state(model)
    x, _ = data()
    whole = copy.deepcopy(adapted(base(), fg.LoRA(rank=2)))
    fg.swap(whole, state)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), model(x), rtol=2e-2, atol=2e-2)


def one_process(rank, port, folder, names):
    from torch.distributed.device_mesh import init_device_mesh

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for name in names:
            check_method(name, methods.FIXED[name], mesh, folder)
        check_placements(mesh)
        check_refusals(mesh)
        check_fsdp2_in_mixed_precision()
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_process, (port, str(tmp_path), list(methods.FIXED)), nprocs=2)


def test_a_plan_of_transformers_is_refused_with_what_to_do():
    parallel_styles = pytest.importorskip("transformers.integrations.tensor_parallel")
    model = nn.Sequential(nn.Linear(4, 4))
    parallel_styles.ColwiseParallel().install_forward(model[0], None)
    with pytest.raises(fg.FxgraftError, match=r"'0' cannot.*transformers' tp_plan.*parallelize_module"):
        fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), ["0"]))
