"""A site that no forward reaches is never silent: refused at once, or at the first forward that would go wrong."""

import copy
import functools
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from methods import BIAS_FREE, MERGEABLE, graft
from small_models import perturb
from torch import nn

import fxgraft as fg

LORA = fg.LoRA(rank=2)
LAST = "reads the base's values of"


class Lambda(nn.Module):
    """Forwards that were bound or captured before grafting."""

    def __init__(self, how):
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        if how == "lambda":
            self.call = lambda x: self.q(x)
        elif how == "partial":
            self.call = functools.partial(F.linear, weight=self.q.weight)
        elif how == "closure":
            weight = self.q.weight
            self.call = lambda x: x @ weight.t()

    def forward(self, x):
        return self.call(self.k(x))


@pytest.mark.parametrize("how", ["lambda", "partial", "closure"])
def test_a_captured_forward_raises_at_the_first_forward(how):
    model, x = Lambda(how), torch.randn(3, 4)
    try:
        adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["q"])))
    except fg.FxgraftError:
        return
    for _ in range(2):
        with pytest.raises(fg.AdapterError, match=LAST):
            adapted(x)
    with fg.disabled(adapted):
        torch.testing.assert_close(adapted(x), model(x))
    fg.set_active(adapted, [])
    torch.testing.assert_close(adapted(x), model(x))


class Gate(nn.Module):
    """Reads its child's weight in a way that torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.on = nn.Linear(4, 4), nn.Linear(4, 4), True

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        y = self.k(x)
        return F.linear(y, self.q.weight, self.q.bias) if self.on else self.q(y)


def later(model=None, targets=("q",), **options):
    """A model whose site turns out dead at run time only."""
    model = model or Gate()
    model.on = False
    return model, perturb(fg.rewrite(model, fg.Spec(LORA, list(targets), **options)))


def raises_now(adapted):
    adapted.on = True
    with pytest.raises(fg.AdapterError, match=rf"{LAST} 'q'.*'default'"):
        adapted(torch.randn(3, 4))


def test_a_weight_read_by_the_parent_raises_and_the_hooks_stay_until_it_is_right():
    _, adapted = later()
    raises_now(adapted)
    adapted.on = False
    x = torch.randn(3, 4)
    torch.testing.assert_close(adapted(x), fg.merge(adapted)(x))
    assert not adapted._forward_hooks and not adapted._forward_pre_hooks


def test_copies_and_pickles_are_watched_too():
    _, adapted = later()
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        raises_now(twin)


def test_every_adapter_is_watched_once():
    _, adapted = later()
    adapted(torch.randn(3, 4))
    assert not adapted._forward_hooks
    both = perturb(fg.rewrite(adapted, fg.Spec(LORA, ["k"]), name="second"))
    both(torch.randn(3, 4))
    assert not both._forward_hooks
    fg.set_active(both, ["default"])  # this one a forward has proved
    assert not both._forward_hooks
    fg.remove(both, "default")
    again = fg.rewrite(both, fg.Spec(LORA, ["q"]))
    raises_now(again)


def test_plain_models_keep_no_hook():
    _, adapted = later()
    assert adapted._forward_hooks
    plain = fg.merge(adapted)
    assert not plain._forward_hooks and not plain._forward_pre_hooks and not plain._forward_hooks_always_called
    fg.remove(adapted, "default")
    assert not adapted._forward_hooks


def test_a_graph_is_judged_before_it_runs():
    class Reads(Gate):
        def forward(self, x):
            y = self.k(x)
            return F.linear(y, self.q.weight, self.q.bias) if self.on else self.q(y)

    _, adapted = later(Reads())
    adapted.on = True
    compiled = fg.compile(adapted)
    for _ in range(2):
        with pytest.raises(fg.AdapterError, match=rf"{LAST} 'q'"):
            compiled(torch.randn(3, 4))
    adapted.on = False
    torch._dynamo.reset()
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(fg.compile(adapted)(x), adapted(x))


def test_an_interrupted_forward_leaves_nothing_behind():
    class Stops(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.how = nn.Linear(4, 4), RuntimeError

        def forward(self, x):
            y = self.q(x)
            if self.how is not None:
                raise self.how
            return y

    adapted = fg.rewrite(nn.Sequential(Stops()), fg.Spec(LORA, ["q"]))
    for how in (RuntimeError, KeyboardInterrupt):
        adapted[0].how = how
        with pytest.raises(how):
            adapted(torch.randn(2, 4))
    adapted[0].how = None
    adapted(torch.randn(2, 4))
    assert torch._C._len_torch_dispatch_stack() == 0 and not adapted._forward_hooks


def test_threads_are_watched_each():
    _, adapted = later()
    failures, x = [], torch.randn(3, 4)
    want = adapted.q(adapted.k(x)).detach()
    go = threading.Barrier(4)

    def run():
        go.wait()
        for _ in range(20):
            failures.append(not torch.allclose(adapted(x), want, atol=1e-5))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 80 and not any(failures) and not adapted._forward_hooks


def test_a_trained_module_whose_base_values_are_read_raises():
    class Captured(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.call = lambda x: self.head(x)

        def forward(self, x):
            return self.call(self.q(x))

    adapted = None
    with pytest.raises(fg.FxgraftError):
        adapted = fg.rewrite(Captured(), fg.Spec(LORA, ["q"], train=["head"]))
        adapted(torch.randn(2, 4))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.experts[int(self.router(x).sum(0).argmax())](x)


def test_routed_experts_warn_and_go_on():
    model, x = Experts(), torch.randn(3, 4)
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["experts.*"])))
    with pytest.warns(UserWarning, match=r"did not reach 2 of 3 places.*experts"):
        first = adapted(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(adapted(x), first)
    torch.testing.assert_close(fg.merge(adapted)(x), first)


def test_a_head_tied_to_an_embedding_may_be_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids, logits=False):
            return self.head(self.embed(ids)) if logits else self.embed(ids)

    adapted = fg.rewrite(Model(), fg.Spec(LORA, ["head"]))
    with pytest.warns(UserWarning, match="did not reach 1 of 1"):
        adapted(torch.tensor([1, 2]))


def test_metadata_of_a_weight_may_be_read():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.skip = nn.Linear(4, 4), True

        def forward(self, x):
            x = x.to(self.q.weight.dtype).to(self.q.weight.device) + torch.zeros_like(self.q.weight).sum()
            x = x + self.q.weight.new_zeros(4) + self.q.weight.t().shape[0]
            return x if self.skip and x.sum() > -1e9 else self.q(x)

    adapted = fg.rewrite(nn.Sequential(Model()), fg.Spec(LORA, ["q"]))
    with pytest.warns(UserWarning, match="did not reach 1 of 1"):
        adapted(torch.randn(2, 4))


def test_a_bank_is_not_watched():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["0"])))
    bank = fg.bank(adapted, {"a": adapted})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(bank(x), model(x))


# -- refused at once ---------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """As WavLM, torchvision's Swin, timm's BEiT and EVA02: the products are the parent's."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.q, self.k, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = getattr(self, self.how)(x)
        return self.out(y)

    def never(self, x):
        return self.k(x)


class Product(Attention):
    def forward(self, x):
        return self.out(F.linear(x, self.q.weight, self.q.bias) + self.k(x))


class Transposed(Attention):
    def forward(self, x):
        return self.helper(x)

    def helper(self, x):
        return self.out(x @ self.q.weight.t().contiguous())


class Joined(Attention):
    def forward(self, x):
        weight = torch.cat([self.q.weight, self.k.weight])
        return self.out(F.linear(x, weight)[..., :4])


class Also(Attention):
    def forward(self, x):
        return self.q(x) + F.linear(x, self.q.weight)


class Grandparent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Attention("never")

    def forward(self, x):
        return x @ self.inner.q.weight


class Slow(Attention):
    """As Mamba's dt_proj: in a branch, but called nowhere."""

    def forward(self, x):
        if x.sum() > -1e9:
            return self.out(x @ self.q.weight)
        return self.out(x)


@pytest.mark.parametrize("cls", [Joined, Also, Slow])
def test_a_parent_that_reads_the_weight_is_seen_at_rewrite(cls):
    for model in (cls("never"), nn.Sequential(cls("never"), cls("never"))):
        with pytest.raises(fg.TargetError, match=rf"q' cannot be adapted: {cls.__name__} .*without calling the layer"):
            fg.rewrite(model, fg.Spec(LORA, ["q"]))
        with pytest.warns(UserWarning, match="left out"):
            adapted = fg.rewrite(model, fg.Spec(LORA))
        assert not any(row.site.endswith("q") for row in fg.explain(adapted).rows)
        fg.rewrite(model, fg.Spec(LORA, ["out"] if cls is not Also else ["k"]))


@pytest.mark.parametrize("method", BIAS_FREE.values(), ids=BIAS_FREE)
@pytest.mark.parametrize("cls", [Product, Transposed])
def test_an_adapter_goes_into_the_product_of_the_parent(cls, method, tmp_path):
    """The model whose layers are called where the parent takes their weights is the oracle."""
    model = nn.Sequential(cls("never"), nn.Tanh(), cls("never")).eval()
    oracle = copy.deepcopy(model)
    for part in (oracle[0], oracle[2]):
        part.__class__ = Called if cls is Product else CalledTransposed
    spec, x = fg.Spec(method, ["q", "out"]), torch.randn(3, 5, 4)
    adapted, expected = perturb(graft(model, spec)), graft(oracle, spec)
    state = fg.adapter_state(adapted)
    fg.swap(expected, dict(state))
    want = expected(x)
    assert list(state) == list(fg.adapter_state(expected))
    assert not torch.allclose(want, model(x), atol=1e-3)
    torch.testing.assert_close(adapted(x), want)
    assert not adapted._forward_hooks  # the watched forward agrees
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == ("fxgraft" in name)
    adapted(x).sum().backward()
    expected(x).sum().backward()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected.get_parameter(name).grad)
    if method in MERGEABLE.values():
        torch.testing.assert_close(fg.merge(adapted)(x), want)
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        torch.testing.assert_close(twin(x), want)
    loaded = fg.load_adapter(model, fg.save_adapter(adapted, tmp_path))
    torch.testing.assert_close(loaded(x), want)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(adapted, backend="eager", fullgraph=True)(x), want)
    with fg.disabled(adapted):
        torch.testing.assert_close(adapted(x), model(x))
    second = perturb(fg.rewrite(adapted, fg.Spec(LORA, ["q"]), name="second"))
    fg.set_active(second, ["default", "second"])
    assert not torch.allclose(second(x), want, atol=1e-3)
    fg.set_active(second, ["default"])
    torch.testing.assert_close(second(x), want)
    fg.remove(second, "default")
    fg.remove(second, "second")
    torch.testing.assert_close(second(x), model(x))
    assert [type(m) for m in second.modules()] == [type(m) for m in model.modules()]
    assert not any("fxgraft" in key for m in second.modules() for key in m.__dict__)


class Called(Attention):
    def forward(self, x):
        return self.out(self.q(x) + self.k(x))


class CalledTransposed(Attention):
    def forward(self, x):
        return self.out(self.q(x) - self.q.bias)


def test_what_a_product_of_the_parent_cannot_be(tmp_path):
    model = Product("never")
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["q"])))
    with pytest.raises(fg.CheckpointError, match="without calling them"):
        fg.save_adapter(adapted, tmp_path, format="peft")
    with pytest.raises(fg.FxgraftError, match="whose"):
        fg.bank(adapted, {"a": adapted})
    with pytest.raises(fg.SpecError, match="bias"):
        no_bias = GLORA_BIAS
        fg.rewrite(Transposed("never"), fg.Spec(no_bias, ["q"]))


GLORA_BIAS = fg.GLoRA(rank=2, path=fg.GLoRAPath("lora", "vector", "none", "none", "vector"))


def test_onnx_of_a_product_of_the_parent(tmp_path):
    adapted = perturb(fg.rewrite(Product("never").eval(), fg.Spec(LORA, ["q", "out"])))
    example = (torch.randn(3, 4),)
    fg.export_onnx(adapted, tmp_path / "model.onnx", example, adapters="swappable")  # compares with torch itself


def test_a_product_of_the_grandparent():
    model, x = Grandparent(), torch.randn(3, 4)
    adapted = perturb(fg.rewrite(nn.Sequential(model), fg.Spec(LORA, ["q"])))
    torch.testing.assert_close(fg.merge(adapted)(x), adapted(x))
    assert not torch.allclose(adapted(x), model(x), atol=1e-3)


class Careful(nn.Module):
    """Reads that are none: shape, dtype, device, and branches that are not taken."""

    def __init__(self):
        super().__init__()
        self.q, self.slow, self.names = nn.Linear(4, 4), False, ["a"]

    def forward(self, x):
        if isinstance(self.q.weight, torch.Tensor) and self.q.weight.dtype != torch.int8:
            x = x.to(self.q.weight.dtype).to(self.q.weight)
        assert self.q.weight is not None and self.q.weight.shape[0] == 4
        if self.slow:
            return F.linear(x, self.q.weight)
        y = F.linear(x, self.q.weight) if self.slow else self.q(x)
        return y + torch.zeros_like(self.q.weight).sum() + self.q.weight.new_zeros(4) + self.q.weight.size(0) - 4


def test_reading_metadata_is_not_reading():
    model, x = Careful(), torch.randn(2, 4)
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["q"])))
    torch.testing.assert_close(adapted(x), fg.merge(adapted)(x))
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["q"])))
    adapted.slow = True
    with pytest.raises(fg.AdapterError, match=LAST):
        adapted(x)


class Bound(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.call = self.q.forward

    def forward(self, x):
        return self.call(x)


def test_a_forward_bound_before_grafting_is_bound_anew():
    model, x = Bound(), torch.randn(2, 4)
    adapted = perturb(fg.rewrite(model, fg.Spec(LORA, ["q"])))
    assert not torch.allclose(adapted(x), model(x), atol=1e-3)
    torch.testing.assert_close(fg.merge(adapted)(x), adapted(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(adapted))(x), adapted(x))
    torch.testing.assert_close(copy.deepcopy(adapted)(x), adapted(x))
    with fg.disabled(adapted):
        torch.testing.assert_close(adapted(x), model(x))
    fg.remove(adapted, "default")
    torch.testing.assert_close(adapted(x), model(x))


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, state_size=4, num_hidden_layers=1)), "dt_proj"


def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=2, pretraining_tp=2, slow_but_exact=True)
    return BloomForCausalLM(config), "dense"


def mobilebert():
    from transformers import MobileBertConfig, MobileBertForMaskedLM

    config = MobileBertConfig(
        vocab_size=16, hidden_size=8, embedding_size=4, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, intra_bottleneck_size=8, true_hidden_size=8,
    )  # fmt: skip
    return MobileBertForMaskedLM(config), "predictions.decoder"


def wavlm():
    from transformers import WavLMConfig, WavLMModel

    config = WavLMConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, conv_dim=(4,), conv_stride=(2,), conv_kernel=(3,), num_feat_extract_layers=1,
    )  # fmt: skip
    return WavLMModel(config), "q_proj"


@pytest.mark.parametrize("make", [mamba, bloom, mobilebert, wavlm])
def test_models_whose_parents_read_weights(make):
    model, target = make()
    model.eval()
    inputs = torch.randn(1, 40) if make is wavlm else torch.tensor([[1, 2, 3, 4]])
    with pytest.raises(fg.FxgraftError, match=r"reads (this weight|the base's values)"):
        perturb(fg.rewrite(model, fg.Spec(LORA, [target])))(inputs)


def test_all_linear_leaves_out_what_a_parent_reads():
    model, _ = mamba()
    with pytest.warns(UserWarning, match="dt_proj"):
        adapted = perturb(fg.rewrite(model.eval(), fg.Spec(LORA)))
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(adapted(ids).logits, fg.merge(adapted)(ids).logits)


def test_one_encoder_of_two_may_run_alone():
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 16, "max_position_embeddings": 8, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=4)
    adapted = perturb(fg.rewrite(CLIPModel(config).eval(), fg.Spec(LORA, ["q_proj"])))
    ids = torch.tensor([[1, 3, 2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted.get_text_features(input_ids=ids)
        adapted(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8))
    assert not adapted._forward_hooks


def test_routed_experts_and_dropped_layers_of_transformers():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, conv_dim=(4,), conv_stride=(2,), conv_kernel=(3,), num_feat_extract_layers=1,
        layerdrop=0.9, mask_time_prob=0.0,
    )  # fmt: skip
    adapted = fg.rewrite(Wav2Vec2Model(config), fg.Spec(LORA, ["q_proj"])).train()
    with pytest.warns(UserWarning, match=r"did not reach \d of 3"):
        torch.manual_seed(3)
        adapted(torch.randn(1, 40))


class Halves(nn.Module):
    """Two blocks of one class, and a function that the model compiles itself where it is told a backend."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        x = self.second(self.first(x))
        return torch.compile(self.own, backend=self.backend)(x) if "backend" in self.__dict__ else self.own(x)

    def own(self, x):
        return self.inner(x)


def test_a_watched_forward_leaves_parts_compiled_on_their_own_compiled():
    """Under a mode of Python's, Dynamo gives up on the code it meets, for good and for every module of the class."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    adapted = perturb(fg.rewrite(Halves().eval(), fg.Spec(fg.LoRA(rank=2), targets=["0", "inner"])))
    x = torch.randn(3, 8)
    with fg.disabled(adapted):
        base = adapted(x)
    want = copy.deepcopy(adapted)(x)
    adapted.__dict__["backend"] = backend
    adapted.first = torch.compile(adapted.first, backend=backend)
    adapted.second.compile(backend=backend)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="adapter 'default'")
        for _ in range(3):
            torch.testing.assert_close(adapted(x), want)
    assert len(graphs) == 3, "each part is compiled once, also by the forward that is watched"
    assert not torch.allclose(want, base)
