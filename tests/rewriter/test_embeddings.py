"""Embeddings as targets by their name: every verb, against a table written by hand in float64 and against HF PEFT."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from methods import METHODS, graft
from small_models import perturb, relative_error
from torch import nn

import fxgraft as fg
from fxgraft.rewriter.state import record_of

LOOKED_UP = {name: m for name, m in METHODS.items() if not isinstance(m, fg.GLoRA)}
PADDING = 2


class Words(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.words = nn.Embedding(11, 6, **options)
        self.fc = nn.Linear(6, 5)

    def forward(self, ids):
        return self.fc(torch.tanh(self.words(ids)))


def words(**options):
    torch.manual_seed(0)
    return Words(**{"padding_idx": PADDING, **options})


def some_ids():
    ids = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(1))
    ids[0, 0] = PADDING
    return ids


def oracle(model, adapted, ids, name="default"):
    """float64, with the factors' product written into the table, but for the padding row."""
    lora = adapted if isinstance(record_of(adapted, name).spec.method, fg.LoRA) else fg.to_lora(adapted, name)
    state, scale = fg.adapter_state(lora, name), record_of(lora, name).spec.method.scale
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        delta = scale * (state["words.B"].double() @ state["words.A"].double()).t()
        if (padding := model.words.padding_idx) is not None:
            delta[padding] = 0
        twin.words.weight += delta
    return twin(ids)


@pytest.mark.parametrize("padding", [PADDING, None])
@pytest.mark.parametrize("method", LOOKED_UP)
def test_every_method_in_every_verb(method, padding, tmp_path):
    model, ids = words(padding_idx=padding), some_ids()
    adapted = perturb(graft(model, fg.Spec(LOOKED_UP[method], "words"))).eval()
    out = adapted(ids)
    assert not torch.allclose(out, model(ids), atol=1e-4)
    if LOOKED_UP[method].not_low_rank is None:
        assert relative_error(out, oracle(model, adapted, ids)) < 1e-5
        merged = fg.merge(adapted)
        assert type(merged.words) is nn.Embedding and merged.words.weight.data_ptr() != model.words.weight.data_ptr()
        assert relative_error(merged(ids), oracle(model, adapted, ids)) < 1e-5
        assert relative_error(fg.to_lora(adapted)(ids), oracle(model, adapted, ids)) < 1e-5
    if padding is not None:
        torch.testing.assert_close(adapted(ids)[0, 0], model(ids)[0, 0], rtol=1e-6, atol=1e-7)
    with fg.disabled(adapted):
        assert torch.equal(adapted(ids), model(ids))
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(twin(ids), out)
    fg.save_adapter(adapted, tmp_path / "own")
    assert torch.equal(fg.load_adapter(model, tmp_path / "own").eval()(ids), out)
    torch._dynamo.reset()
    compiled = torch.compile(adapted, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), out, rtol=1e-5, atol=1e-6)
    adapted.train()
    adapted(ids).square().sum().backward()
    grads = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert grads and all(g is not None and g.abs().sum() > 0 for g in grads)
    assert any(row.shape == "6 x 11" for row in fg.explain(adapted).rows)
    fg.remove(adapted, "default")
    assert torch.equal(adapted(ids), model(ids))


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if isinstance(m, fg.GLoRA)])
def test_what_changes_the_table_as_a_whole_is_refused(method):
    with pytest.raises(fg.SpecError, match=r"'words'.*(multiplies no rows.*overrides=|a bias.*Exclude the site)"):
        fg.rewrite(words(), fg.Spec(METHODS[method], "words"))


def test_gradients_are_those_of_the_table_written_out():
    model, ids = words(scale_grad_by_freq=True), some_ids()
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), "words")))
    adapted(ids).square().sum().backward()
    A = fg.adapter_state(adapted)["words.A"].clone().requires_grad_()
    B = fg.adapter_state(adapted)["words.B"].clone().requires_grad_()
    z = F.embedding(ids, A.t(), PADDING, scale_grad_by_freq=True) * (ids != PADDING).unsqueeze(-1)
    y = F.embedding(ids, model.words.weight.detach()) + 8 * z @ B.t()
    model.fc(torch.tanh(y)).square().sum().backward()
    own = dict(adapted.words.named_parameters())
    torch.testing.assert_close(own["fxgraft.default.A"].grad, A.grad)
    torch.testing.assert_close(own["fxgraft.default.B"].grad, B.grad)
    assert not own["fxgraft.default.A"].grad[:, PADDING].any()


def test_lora_starts_as_its_authors_embedding_does():
    torch.manual_seed(0)
    state = fg.adapter_state(fg.rewrite(words(), fg.Spec(fg.LoRA(rank=4, dropout=0.5), ["words", "fc"])))
    assert not state["words.A"].any() and 0.5 < state["words.B"].std() < 1.5
    assert state["fc.A"].any() and not state["fc.B"].any()


def test_several_adapters_with_weights_beside_a_linear():
    model, ids = words(), some_ids()
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), ["words", "fc"]), name="a"))
    adapted = perturb(
        fg.rewrite(adapted, fg.Spec(fg.PRoLoRA(rank=2, unshared=1, a_chunks=2, b_chunks=2), "words"), "b")
    )
    fg.set_active(adapted, {"a": 0.5, "b": -2.0})
    torch.testing.assert_close(fg.merge(adapted)(ids), adapted(ids), rtol=1e-4, atol=1e-5)
    combined = fg.combine(adapted, ["a", "b"], method="cat", weights=[0.5, -2.0])
    torch.testing.assert_close(combined(ids), adapted(ids), rtol=1e-4, atol=1e-5)
    state = {k: v * 3 for k, v in fg.adapter_state(adapted, "a").items()}
    fg.swap(adapted, state, "a")
    torch.testing.assert_close(fg.merge(adapted)(ids), adapted(ids), rtol=1e-4, atol=1e-5)


class ScaledWords(nn.Embedding):
    """As Gemma's and BART's word embeddings."""

    def __init__(self, *args, scale):
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


def test_scaled_word_embeddings():
    model, ids = words(), some_ids()
    model.words = ScaledWords(11, 6, PADDING, scale=2.5)
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), "words")))
    assert relative_error(adapted(ids), oracle(model, adapted, ids)) < 1e-5
    assert relative_error(fg.merge(adapted)(ids), oracle(model, adapted, ids)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_table_stays_narrow(dtype):
    model, ids = words().to(dtype), some_ids()
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), "words")))
    assert adapted.words.fxgraft.default.A.dtype == torch.float32
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert adapted(ids).dtype == adapted.words(ids).dtype == dtype
    assert relative_error(adapted(ids), oracle(model, adapted, ids)) < 0.02


def test_a_table_that_renorms_itself_is_refused():
    with pytest.raises(fg.TargetError, match=r"'words' cannot be adapted"):
        fg.rewrite(words(max_norm=1.0), fg.Spec(fg.LoRA(rank=2), "words"))


def test_only_its_own_name_means_it():
    model = words()
    assert {s.name for s in record_of(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2))), "default").sites} == {"fc"}
    for pattern in ("*", "re:.*"):
        sites = record_of(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), pattern)), "default").sites
        assert {s.name for s in sites} == {"fc"}
    with pytest.raises(fg.TargetError, match="taken by their names only"):
        fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), "w*s"))
    sites = record_of(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), "re:words|fc")), "default").sites
    assert {s.name for s in sites} == {"words", "fc"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.words(ids)))


@pytest.mark.parametrize("targets", [["words"], ["head"], ["words", "head"]])
def test_a_tied_head_and_its_embedding_are_sites_of_their_own(targets):
    model, ids = Tied(), some_ids()
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), targets)))
    state, scale = fg.adapter_state(adapted), 8
    table, head = model.words.weight.double(), model.head.weight.double()
    if "words" in targets:
        table = table + scale * (state["words.B"].double() @ state["words.A"].double()).t()
    if "head" in targets:
        head = head + scale * state["head.B"].double() @ state["head.A"].double()
    expected = torch.tanh(F.embedding(ids, table)) @ head.t()
    assert relative_error(adapted(ids), expected) < 1e-5
    merged = fg.merge(adapted)
    assert relative_error(merged(ids), expected) < 1e-5
    assert merged.words.weight is not merged.head.weight
    assert model.words.weight is model.head.weight


def test_exports(tmp_path):
    pytest.importorskip("onnxruntime")
    model, ids = words(), some_ids()
    adapted = perturb(fg.rewrite(model, fg.Spec(fg.LoRA(rank=2), ["words", "fc"]))).eval()
    batch = {"ids": {0: torch.export.Dim.DYNAMIC}}
    fg.export_onnx(adapted, tmp_path / "merged.onnx", (ids,), dynamic_shapes=batch)
    (out,) = fg.OrtSession(tmp_path / "merged.onnx").run({"ids": ids}).values()
    torch.testing.assert_close(torch.as_tensor(out), adapted(ids).detach(), rtol=1e-4, atol=1e-5)


# -- HF PEFT ---------------------------------------------------------------------------------------------------------
def in_peft(model, **config):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return perturb(peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, lora_dropout=0.1, **config)))


@pytest.mark.parametrize("targets", [["words"], ["words", "fc"], r"words|fc"])
def test_peft_folders_both_ways(targets, tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = words(), some_ids()
    theirs = in_peft(model, target_modules=targets).eval()
    with torch.no_grad():  # as training leaves it
        theirs.base_model.model.words.lora_embedding_A["default"][:, PADDING] = 0
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fg.load_adapter(model, tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(ids), theirs(ids), rtol=1e-5, atol=1e-6)
    perturb(ours)
    fg.save_adapter(ours, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    torch.testing.assert_close(again(ids), ours(ids), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fg.load_adapter(model, tmp_path / "ours").eval()(ids), ours(ids), rtol=1e-5, atol=1e-6)


def test_a_step_of_training_is_pefts(tmp_path):
    model, ids = words(), some_ids()
    theirs = in_peft(model, target_modules=["words"]).eval()
    with torch.no_grad():
        theirs.base_model.model.words.lora_embedding_A["default"][:, PADDING] = 0
    theirs.save_pretrained(tmp_path / "a")
    ours = fg.load_adapter(model, tmp_path / "a").eval()
    for module in (theirs, ours):
        module(ids).square().sum().backward()
    layer, own = theirs.base_model.model.words, dict(ours.words.named_parameters())
    torch.testing.assert_close(own["fxgraft.default.A"].grad, layer.lora_embedding_A["default"].grad)
    torch.testing.assert_close(own["fxgraft.default.B"].grad, layer.lora_embedding_B["default"].grad)


def test_a_folder_that_changes_the_padding_row_is_refused(tmp_path):
    model = words()
    in_peft(model, target_modules=["words"]).save_pretrained(tmp_path / "a")
    with pytest.raises(fg.CheckpointError, match=r"changes row 2 of the embedding 'words', its padding_idx"):
        fg.load_adapter(model, tmp_path / "a")
    model.words.padding_idx = None
    assert record_of(fg.load_adapter(model, tmp_path / "a"), "default").sites[0].name == "words"


def test_other_methods_have_no_peft_form_there(tmp_path):
    adapted = fg.rewrite(words(), fg.Spec(fg.VeRA(rank=4), ["words"]))
    with pytest.raises(fg.CheckpointError, match="adapter 'default' cannot be saved for PEFT"):
        fg.save_adapter(adapted, tmp_path / "a", format="peft")


def test_a_bank_says_what_to_do():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4))
    adapted = fg.rewrite(model, fg.Spec(fg.LoRA(2), ["0", "1"]))
    with pytest.raises(fg.FxgraftError, match=r"'0' cannot.*make the bank of adapters without this site"):
        fg.bank(adapted, {"a": adapted}, example_inputs=(torch.arange(6).view(2, 3),))
