"""Adapters of models that FSDP2 has sharded: whole tensors on every process, one writer, every process loads."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from small_models import MLP, perturb
from torch import nn

import fxgraft as fg

METHODS = {"lora": fg.LoRA(2, 5), "unilora": fg.UniLoRA(2, 30, init_bound=0.3), "xs": fg.LoRAXS(2)}


def base():
    torch.manual_seed(0)
    return MLP(bias=True).eval()


def adapted(method, seed=1):
    model = fg.rewrite(base(), fg.Spec(method, ["up", "down"], train=["head"]))
    torch.manual_seed(seed)
    return perturb(model)


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    for layer in (model.up, model.down, model.head):
        fully_shard(layer)
    fully_shard(model)
    return model


def one_process(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for name, method in METHODS.items():
            check_method(method, f"{folder}/{name}", rank)
        check_refusals(folder, rank)
        check_ddp(folder, rank)
    finally:
        dist.destroy_process_group()


def check_method(method, folder, rank):
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(9))
    plain, other = adapted(method), adapted(method, seed=2)
    expected, state = plain(x).detach(), fg.adapter_state(plain)
    model = sharded(adapted(method))
    assert any(hasattr(p, "full_tensor") for p in model.parameters())
    whole = fg.adapter_state(model)
    assert list(whole) == list(state) and all(torch.equal(t, state[k]) for k, t in whole.items())
    assert not any(hasattr(t, "full_tensor") for t in whole.values())
    # the first process writes, and when any returns the folder is there
    fg.save_adapter(model, folder)
    loaded = fg.load_adapter(base(), folder)
    assert torch.equal(loaded(x), expected)
    torch.testing.assert_close(sharded(loaded)(x), expected)
    if not isinstance(method, fg.LoRAXS):
        fg.save_adapter(model, f"{folder}-peft", format="peft")
        torch.testing.assert_close(fg.load_adapter(base(), f"{folder}-peft")(x), expected)
    # other values, in place, from every kind of source
    for source in (fg.adapter_state(other), dict(fg.adapter_state(sharded(adapted(method, seed=2)))), other):
        fg.swap(model, source)
        torch.testing.assert_close(model(x), other(x))
    fg.swap(model, folder)
    torch.testing.assert_close(model(x), expected)
    # and a step of training moves what is saved
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    model.eval()
    fg.save_adapter(model, folder)
    moved = fg.load_adapter(base(), folder)(x)
    torch.testing.assert_close(moved, model(x))
    assert not torch.allclose(moved, expected)


def check_refusals(folder, rank):
    with pytest.raises(fg.AdapterError, match=r"sharded by fully_shard.*shard the adapted model"):
        fg.load_adapter(sharded(base()), f"{folder}/lora")
    model = sharded(adapted(METHODS["lora"]))
    with pytest.raises(fg.AdapterError, match=r"alpha|scale"):
        fg.swap(model, fg.adapter_state(adapted(fg.LoRA(2, 9))))
    with pytest.raises(fg.FxgraftError, match="cannot write"):  # on every process, and none waits for the other
        fg.save_adapter(model, "/dev/null/a")
    with pytest.raises(fg.FxgraftError):
        fg.merge(model)


def check_ddp(folder, rank):
    """Every process has the whole adapter: the one that is asked to writes, and no other has to come."""
    model = nn.parallel.DistributedDataParallel(adapted(METHODS["lora"]))
    model(torch.randn(3, 7)).sum().backward()
    if rank == 0:
        fg.save_adapter(model, f"{folder}/ddp")
    dist.barrier()
    x = torch.randn(4, 7)
    assert torch.equal(fg.load_adapter(base(), f"{folder}/ddp")(x), model(x))


def test_two_processes(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_process, (port, str(tmp_path)), nprocs=2)


@pytest.mark.parametrize("format", ["fxgraft", "peft"])
def test_parameters_that_are_elsewhere_are_not_saved_as_empty(tmp_path, format):
    """ZeRO-3 leaves a parameter of size 0 on every process, and keeps its shape in an attribute."""
    model = adapted(METHODS["lora"])
    fg.save_adapter(model, tmp_path, format=format)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for parameter in (model.up.fxgraft.default.A, model.head.fxgraft.default.weight):
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    with pytest.raises(fg.CheckpointError, match=r"up\..*A.*head\.weight' has no values here.*GatheredParameters"):
        fg.save_adapter(model, tmp_path, format=format)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
