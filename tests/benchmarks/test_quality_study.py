"""The quality study's rules: what is tried next, what counts as best, the equal budget, resuming, the table."""

from __future__ import annotations

import io
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

QUALITY = Path(__file__).resolve().parents[2] / "benchmarks" / "quality"
sys.path.insert(0, str(QUALITY))  # the study is a script and imports its parts as such

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import study  # noqa: E402 (it puts the folders of the other two on the path)

import charts  # noqa: E402 isort: skip
import contenders  # noqa: E402 isort: skip
import quickstart  # noqa: E402 isort: skip
import records  # noqa: E402 isort: skip
import training  # noqa: E402 isort: skip
import transformers  # noqa: E402 isort: skip
from rich.console import Console  # noqa: E402 isort: skip

BY_KEY = {contender.key: contender for contender in (*contenders.CONTENDERS, contenders.FULL)}
METHODS = [contender for contender in contenders.CONTENDERS if not contender.reference]


# -- tuning --------------------------------------------------------------------------------------------------------
def tune(grid: tuple[int, ...], optimum: int) -> list[int]:
    """The candidates that are tried when the loss is the distance to an optimum."""
    losses: dict[int, float] = {}
    while (candidate := records.next_candidate(grid, losses)) is not None:
        assert candidate not in losses
        losses[candidate] = abs(candidate - optimum)
    return list(losses)


@pytest.mark.parametrize(
    ("optimum", "tried"),
    [
        (-4, [-5, -4, -3]),  # between two others: done
        (-5, [-5, -4, -3, -6]),  # at the edge, and the next one is worse
        (-6, [-5, -4, -3, -6, -7]),
        (-9, [-5, -4, -3, -6, -7]),  # further down, but the extensions are used up
        (-2, [-5, -4, -3, -2, -1]),
    ],
)
def test_the_grid_is_extended_only_where_the_best_is_at_its_edge(optimum, tried):
    assert tune((-5, -4, -3), optimum) == tried


def test_best_is_the_lowest_loss_then_the_smallest_rate_and_never_a_diverged_run():
    assert records.best({-3: 0.4, -4: 0.3, -5: 0.5}) == -4
    assert records.best({-3: 0.3, -4: 0.3}) == -4
    assert records.best({-3: math.inf, -4: 0.9}) == -4


def test_half_decades():
    assert records.learning_rate(-4) == pytest.approx(1e-2)
    assert records.learning_rate(-5) == pytest.approx(3.1623e-3, rel=1e-4)


def test_spread_is_the_sample_deviation():
    found = records.spread([0.80, 0.82, 0.84])
    assert found.mean == pytest.approx(0.82)
    assert found.deviation == pytest.approx(0.02)
    assert records.spread([0.5]) == records.Spread(0.5, None)


# -- the results file ----------------------------------------------------------------------------------------------
def test_results_resume_and_drop_a_line_that_was_cut(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    results = records.Results(path)
    results.begin({"seeds": (1, 2)}, {"threads": 1})
    results.append("tuning", method="lora", half_decades=-4, loss=0.5)
    results.append("tuning", method="lora", half_decades=-3, loss=None)
    results.append("tuning", method="lora", half_decades=-4, loss=0.7)
    results.append("tuning", method="prolora", half_decades=-3, loss=0.1)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "tuning", "method": "lo')
    again = records.Results(path)
    again.begin({"seeds": [1, 2]}, {"threads": 2})
    assert again.losses("lora") == {-4: pytest.approx(0.6), -3: math.inf}
    assert again.environment == {"threads": 1}
    again.append("final", method="lora", seed=1)
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == [
        *("study", "tuning", "tuning", "tuning", "tuning", "final")
    ]
    assert again.of("final", seed=1) and not again.of("final", seed=2)


def test_results_of_another_protocol_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    records.Results(path).begin({"train": 10, "test": 5}, {})
    before = path.read_text()
    with pytest.raises(SystemExit, match=r"other settings \(train\).*another --out"):
        records.Results(path).begin({"train": 11, "test": 5}, {})
    assert path.read_text() == before


# -- the contenders ------------------------------------------------------------------------------------------------
def bert(layers: int, width: int) -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=40, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def headlines(count: int, seed: int = 0) -> quickstart.Headlines:
    """Token lists of different lengths; the label is whether token 7 is there."""
    rng = random.Random(seed)
    labels = [rng.randrange(2) for _ in range(count)]
    tokens = [
        [1, *(7 if label and i == 0 else rng.randrange(10, 60) for i in range(rng.randrange(3, 8))), 2]
        for label in labels
    ]
    return quickstart.Headlines([""] * count, tokens, torch.tensor(labels))


def run_of(seed: int = 3, lr: float = 1e-2, count: int = 24) -> contenders.Run:
    data = headlines(count)
    return contenders.Run(seed, lr, training.steps(data, 4, 1), data, headlines(12, 1), contenders.Search(1, 3, 8))


def test_every_method_has_the_budget_on_the_real_sizes():
    counts = {}
    for contender in METHODS:
        layers = 6 if contender.key == "unilora" else 1  # its vector is the whole model's; the others count by site
        model = contender.build(bert(layers, 384), run_of())
        counts[contender.key] = training.trained(model) * 6 // layers
    supernet = counts.pop("glora")  # the search brings it below the budget
    assert supernet > contenders.BUDGET
    assert counts == {
        **dict.fromkeys(("lora", "unilora", "prolora", "hydralora"), contenders.BUDGET),
        **dict.fromkeys(("lora_xs", "lora_sb"), 36_300),
    }


@pytest.mark.parametrize("key", ["lora", "hydralora", "head", "full"])
def test_a_run_trains_the_adapter_and_the_head_or_what_a_reference_says(key):
    base = bert(2, 32)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    run = run_of()
    model = BY_KEY[key].build(base, run)
    trains = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    training.train_model(model, run, head_lr=1e-2, batch_size=4, epochs=1)
    after = dict(model.named_parameters())
    heads = {name for name in trains if name.startswith("classifier.")}
    assert len(heads) == 2
    unmoved = {name for name, value in trains.items() if torch.equal(value, after[name])}
    assert not unmoved & heads
    if key == "head":
        assert set(trains) == heads
    elif key == "full":
        assert set(trains) == set(before)
    else:
        assert not any(".default." in name for name in unmoved)
    frozen = set(before) - set(trains)
    assert all(torch.equal(before[name], after[name]) for name in frozen)


def test_the_learning_rates_reach_their_parameters(monkeypatch):
    seen = []

    class Spy(torch.optim.AdamW):
        def __init__(self, groups, **options):
            seen.append([(group["lr"], sum(p.numel() for p in group["params"])) for group in groups])
            super().__init__(groups, **options)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    run = run_of(lr=3e-3, count=8)
    for key in ("lora", "head"):
        model = BY_KEY[key].build(bert(2, 32), run)
        training.train_model(model, run, head_lr=7e-3, batch_size=4, epochs=1)
    assert seen == [[(7e-3, 66), (3e-3, 2 * 2 * 4 * 64)], [(7e-3, 66)]]


def test_a_seed_gives_the_same_run_twice_and_another_seed_another():
    def logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        run = run_of(seed)
        model = BY_KEY["glora"].build(bert(2, 32), run)
        training.train_model(model, run, head_lr=1e-2, batch_size=4, epochs=1)
        model = BY_KEY["glora"].finish(model, run)
        return quickstart.collect(quickstart.torch_predict(model), run.validation)

    torch.testing.assert_close(logits(1), logits(1), rtol=0, atol=0)
    assert not torch.equal(logits(1), logits(2))


def test_glora_ends_within_the_budget_with_its_trained_head(monkeypatch):
    monkeypatch.setattr(contenders, "BUDGET", 500)
    run = run_of()
    supernet = BY_KEY["glora"].build(bert(2, 32), run)
    with torch.no_grad():
        for name, p in supernet.named_parameters():
            if name.startswith("classifier.") and p.requires_grad:
                p.fill_(5.0)
    fixed = BY_KEY["glora"].finish(supernet, run)
    heads = [p for name, p in fixed.named_parameters() if name.startswith("classifier.") and p.requires_grad]
    assert 0 < training.trained(fixed) <= 500 < training.trained(supernet)
    assert len(heads) == 2 and all(bool((p == 5).all()) for p in heads)


def test_stored_bytes_are_those_of_the_adapter_or_of_what_a_reference_trains():
    run = run_of()
    lora = BY_KEY["lora"].build(bert(2, 32), run)
    numbers = training.trained(lora, with_head=True)
    assert numbers == training.trained(lora) + 66
    assert 4 * numbers < training.stored_bytes(lora, BY_KEY["lora"]) < 4 * numbers + 8000
    head = BY_KEY["head"].build(bert(2, 32), run)
    assert training.stored_bytes(head, BY_KEY["head"]) == 4 * 66


# -- the order of the study ----------------------------------------------------------------------------------------
def test_the_test_headlines_are_scored_once_per_finished_model(tmp_path, monkeypatch):
    """Everything but the training itself, with two contenders; a second run finds nothing left to do."""
    scored, trained = [], []
    parts = {name: headlines(12, seed) for seed, name in enumerate(("test", "validation", "train"))}
    monkeypatch.setattr(study, "minilm_dir", lambda: tmp_path)
    monkeypatch.setattr(quickstart, "read_headlines", lambda folder, sizes: list(parts.values()))

    def run_once(contender, folder, run, *, head_lr, batch_size, epochs):
        trained.append((contender.key, run.seed, round(run.lr, 4), head_lr, len(run.train)))
        return training.Outcome(torch.nn.Identity(), 10, 20, 30, 1.0, 0.5)

    def score(model, data):
        name = next(name for name, part in parts.items() if part is data)
        scored.append(name)
        return 0.75, abs(math.log10(trained[-1][2]) + 2)

    monkeypatch.setattr(training, "run_once", run_once)
    monkeypatch.setattr(training, "score", score)
    settings = study.Settings(train=12, seeds=(1, 2), head_lr=0.5)
    results = records.Results(tmp_path / "results.jsonl")
    results.begin({"test": 12}, {})
    two = [BY_KEY["lora"], BY_KEY["head"]]
    study.Study(settings, results).run(two)
    assert scored == ["validation"] * 12 + ["test"] * 4
    assert [t for t in trained if t[1] not in settings.tuning_seeds] == [
        *[("lora", 1, 0.01, 0.5, 12), ("head", 1, 0.01, 0.01, 12)],
        *[("lora", 2, 0.01, 0.5, 12), ("head", 2, 0.01, 0.01, 12)],
    ]
    assert [t[1] for t in trained[:12]] == [0, 4] * 6
    before = list(trained)
    study.Study(settings, records.Results(results.path)).run(two)
    assert trained == before


def test_the_seeds_of_the_figures_are_not_those_of_the_tuning():
    settings = study.Settings()
    assert not set(settings.tuning_seeds) & set(settings.seeds)
    assert len(set(settings.seeds)) == 3


# -- the table and the plot ----------------------------------------------------------------------------------------
def printed(results: records.Results) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(charts.table(results))
    return console.file.getvalue()


def test_table_and_plot(tmp_path):
    results = records.Results(tmp_path / "results.jsonl")
    results.begin({"test": 100, "epochs": 1, "train": 10, "batch": 2, "head_lr": 0.01}, {"torch": "2"})
    for seed, accuracy, count in ((2, 0.9, 30), (1, 0.8, 40)):
        results.append(
            "final", method="glora", seed=seed, half_decades=-4, accuracy=accuracy, parameters=count, bytes=2048,
            train_seconds=10.0, other_seconds=4.0,
        )  # fmt: skip
    text = printed(results)
    results.append("probe", accuracy=0.7, c=10.0)
    row = [cell.strip() for cell in next(line for line in text.splitlines() if "GLoRA" in line).strip("|").split("|")]
    assert row[2:] == ["30 to 40", "2.0 kB", "1.0e-02", "0.8500 ± 0.0707", "0.8000 0.9000", "10", "4"]
    assert "LoRA-XS" not in text  # it has no finished run
    probe, first, *_ = charts.notes(results)
    assert "0.7000 (C 10)" in probe
    assert "0.0357" in first  # sqrt(.85 * .15 / 100)
    charts.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_measured_study_is_complete_and_its_table_is_in_the_readme():
    results = records.Results(QUALITY / "results.jsonl")
    seeds = results.settings["seeds"]
    for contender, lines in charts.rows(results):
        assert [line["seed"] for line in lines] == seeds, contender.key
        assert {line["half_decades"] for line in lines} == {records.best(results.losses(contender.key))}
        assert records.next_candidate(contender.grid, results.losses(contender.key)) is None
        assert contender.reference or all(line["parameters"] <= contenders.BUDGET for line in lines)
    assert len(results.of("probe")) == 1
    assert {contender.key for contender, _ in charts.rows(results)} >= {c.key for c in contenders.CONTENDERS}
    readme = (QUALITY / "README.md").read_text(encoding="utf-8")
    for line in printed(results).strip().splitlines():
        assert line.strip() in readme
