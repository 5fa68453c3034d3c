"""Adapters as the methods' authors store them, in folders built by hand for a network of two linears and a head."""

import json

import torch
from adapter_files import CONFIG, WEIGHTS
from safetensors.torch import save_file
from torch import nn

P = "base_model.model."


class Net(nn.Module):
    """Rectangular; `down` has no bias."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"up": nn.Linear(7, 11), "down": nn.Linear(11, 6, bias=False)})
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layers["down"](torch.tanh(self.layers["up"](x))))


SITES = {"layers.up": (11, 7), "layers.down": (6, 11)}  # out, in


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / WEIGHTS)
    return folder


def run(net, x, layer, head=None):
    """The network with `layer(name, x)` in place of its two linears."""
    hidden = layer("layers.down", torch.tanh(layer("layers.up", x)))
    return (head or net.head)(hidden)


def base(net, name, x):
    return net.get_submodule(name)(x)


def same_model(net, before):
    now = net.state_dict()
    return list(before) == list(now) and all(torch.equal(t, before[k]) for k, t in now.items())


# -- the folders ---------------------------------------------------------------------------------------------------
FORK = {"peft_type": "LORA", "target_modules": ["up", "down"], "lora_dropout": 0.0, "bias": "none", "task_type": None}


def hydralora(folder, experts=3):
    tensors = {}
    for site, (out, width) in SITES.items():
        tensors[f"{P}{site}.lora_route.weight"] = torch.randn(experts, width)
        tensors[f"{P}{site}.lora_A.weight"] = torch.randn(2, width)
        for i in range(experts):
            tensors[f"{P}{site}.lora_B{i}.weight"] = torch.randn(out, 2)
    config = {**FORK, "r": 2, "lora_alpha": 3, "lora_nums": experts, "merge_weights": False, "blc_alpha": 0.1}
    return write(folder, config, tensors)


def latent(folder, **config):
    tensors = {}
    for site, (out, width) in SITES.items():
        tensors[f"{P}{site}.lora_A.weight"] = torch.randn(3, width)
        tensors[f"{P}{site}.lora_B.weight"] = torch.randn(out, 3)
        tensors[f"{P}{site}.default_lora_latent_mapping.weight"] = torch.randn(3, 3)
    return write(folder, {**FORK, "r": 3, "lora_alpha": 5, **config}, tensors)


def prolora(folder, r=5, u=2, m=3, n=4, empty=False, **config):
    q, tensors = r - u, {}
    for site, (out, width) in SITES.items():
        if q or empty:
            tensors[f"{P}{site}.lora_A.default.weight"] = torch.randn(q, -(-width // m))
            tensors[f"{P}{site}.lora_B.default.weight"] = torch.randn(-(-out // n), q)
        if u or empty:
            tensors[f"{P}{site}.lora_A_vec.default"] = torch.randn(u, width)
            tensors[f"{P}{site}.lora_B_vec.default"] = torch.randn(u, out)
    config = {**FORK, "r": r, "lora_alpha": 8, "unshared_r": u, "reduce_lora_A_x": m, "reduce_lora_B_x": n, **config}
    return write(folder, config, tensors)


def unilora(folder, d=20):
    tensors = {"vector_bank": torch.randn(d)}
    for site, (out, width) in SITES.items():
        # uneven on purpose, and the last entry is used by nobody
        tensors[f"{site}.project_params_A"] = torch.randint(0, d - 1, (width, 3)) // 2 * 2
        tensors[f"{site}.project_params_B"] = torch.randint(0, d - 1, (3, out))
    return write(folder, {"method": "unilora", "rank": 3, "vector_length": d}, tensors)


FULL = {"A": "LoRA_3", "B": "LoRA_3", "C": "LoRA_3", "D": "vector", "E": "vector"}


def glora(folder, up=FULL, down=FULL):
    tensors = {}
    for site, (out, width) in SITES.items():
        shapes = {"Ad": (out, 3), "Au": (3, width), "Bd": (out, 3), "Bu": (3, width)}
        shapes |= {"Cd": (width, 3), "Cu": (3, 1), "D": (out,), "E": (out,)}
        tensors |= {f"{site}.{name}": torch.randn(shape) for name, shape in shapes.items()}
    return write(folder, {"method": "glora", "rank": 3, "paths": {"layers.up": up, "layers.down": down}}, tensors)


# -- refusals ------------------------------------------------------------------------------------------------------
MAKERS = {"hydralora": hydralora, "latent": latent, "prolora": prolora, "unilora": unilora, "glora": glora}
