"""`gramian prune` as a job: what a run writes, how it goes on after a stop, and who sees which examples."""

import csv
import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from sklearn.datasets import load_iris

from gramian.bayes.split import fingerprint
from gramian.compress.learning import Learning
from gramian.errors import DivergedError, InputError, StoppedError
from gramian.tasks import pruning, pruning_run
from gramian.tasks.pruning import Plan, held_out_error
from gramian.tasks.pruning_data import Data, Examples
from gramian.tasks.pruning_files import load_pruned, load_scaling
from gramian.tasks.pruning_networks import Network, build
from gramian.tasks.pruning_result import Pruning, pruned_of
from gramian.tasks.pruning_run import DENSE, Dense, PruneConfig, evidence_of, prune_classifier
from gramian.tasks.self_bounded import Bounding

SHORT = Learning(steps=6, rate=0.1, record_every=3)


@pytest.fixture
def config(tmp_path: Path) -> PruneConfig:
    """Digits, some of them, and as few steps as there can be."""
    return PruneConfig(
        data=Data(count=300),
        dense=Dense(widths=(20,), train_steps=60, train_rate=5e-3),
        densities=(0.5, 0.2),
        plan=Plan(learning=replace(SHORT, learn="both")),
        bounding=Bounding(learning=SHORT, draws=10),
        runs=tmp_path / "runs",
    )


@pytest.fixture
def certified(config: PruneConfig) -> PruneConfig:
    return replace(config, certify=True)


def run(config: PruneConfig, **options: bool) -> Pruning:
    return prune_classifier(config, Console(quiet=True), **options)


def outcomes(folder: Path) -> dict[str, Any]:
    """Everything that was written of the densities, seconds apart, which are measured."""
    found = {}
    for path in sorted(folder.glob("density-*/*")):
        found[str(path.relative_to(folder))] = path.read_bytes()
        if path.name == "outcome.json":
            outcome = json.loads(path.read_text())
            outcome["export"]["speed"] = None
            found[str(path.relative_to(folder))] = json.dumps(outcome).encode()
    return found


def test_what_a_run_writes(config: PruneConfig) -> None:
    found = run(config)
    folder = config.runs / "prune"
    assert config.folder == folder
    assert {path.name for path in folder.iterdir()} == {
        "settings.json",
        DENSE,
        "density-0.5",
        "density-0.2",
    }
    assert found.title == "mlp 20 on scikit-learn digits"
    assert found.examples == {"prior": 240, "bound": 0, "held_out": 60}
    assert [each.density for each in found.outcomes] == [0.5, 0.2]
    examples = config.data.load()
    evidence = evidence_of(config, examples)
    network = Network("mlp", (1, 8, 8), 10, (20,))
    dense = build(network, 0).eval()
    dense.load_state_dict(load_file(folder / DENSE))
    assert found.dense == held_out_error(dense, evidence) < 0.5
    raw = examples.x[evidence.held_out]
    for each in found.outcomes:
        place = folder / f"density-{each.density:g}"
        assert {"network.json", "pruned.safetensors", "outcome.json"} <= {
            path.name for path in place.iterdir()
        }
        assert pruned_of(json.loads((place / "outcome.json").read_text())).fixed == each.fixed
        assert each.guarantee is None
        model, scaling = load_pruned(place), load_scaling(place)
        assert scaling is not None
        wrong = model(scaling(raw).float()).argmax(-1) != examples.y[evidence.held_out]
        assert each.fixed == float(wrong.double().mean())
        weights = [value for name, value in model.named_parameters() if name.endswith("weight")]
        kept = sum(int((value != 0).sum()) for value in weights)
        assert kept == round(each.density * (64 * 20 + 20 * 10))
        assert each.export["nonzero"] >= kept


def test_densities_share_the_confidence(certified: PruneConfig) -> None:
    found = run(certified)
    assert found.examples == {"prior": 120, "bound": 120, "held_out": 60}
    examples = certified.data.load()
    split = evidence_of(certified, examples).split
    assert split is not None
    for each in found.outcomes:
        made = each.guarantee
        assert made is not None
        for certificate in (made.posterior, made.prior, made.fixed):
            assert certificate is not None
            assert certificate.union == math.log(2)
            assert (certificate.n, certificate.seen) == (120, fingerprint(split.prior))
            assert certificate.bound_set == fingerprint(split.bound)
        assert made.prior.kl == 0 < made.posterior.kl
    single = run(replace(certified, densities=(0.5,), name="single")).outcomes[0].guarantee
    assert single is not None
    assert single.posterior.union == 0
    both = found.outcomes[0].guarantee
    assert both is not None
    assert single.posterior.kl == both.posterior.kl
    assert single.prior.value < both.prior.value


def stopping(after: Path) -> Callable[[], Any]:
    """Signals that ask to stop at the fifth question after a file is there."""
    asked: list[None] = []

    def requested() -> str | None:
        if after.exists():
            asked.append(None)
        return "SIGTERM" if len(asked) > 5 else None

    @contextmanager
    def requests() -> Iterator[Callable[[], str | None]]:
        yield requested

    return requests


def test_a_stopped_run_goes_on_to_the_same_bits(certified: PruneConfig, monkeypatch) -> None:
    whole = run(replace(certified, name="whole"))
    with monkeypatch.context() as patch:
        patch.setattr(pruning_run, "stop_requests", stopping(certified.folder / "density-0.5/outcome.json"))
        with pytest.raises(
            StoppedError, match=r"stopped by SIGTERM; 1 of 2 densities are saved in .*--resume"
        ):
            run(certified)
    folder = certified.folder
    assert {path.name for path in folder.iterdir()} == {"settings.json", DENSE, "density-0.5"}
    dense, first = (folder / DENSE).stat(), (folder / "density-0.5" / "outcome.json").stat()
    resumed = run(certified, resume=True)
    assert (folder / DENSE).stat().st_mtime_ns == dense.st_mtime_ns  # not made again
    assert (folder / "density-0.5" / "outcome.json").stat().st_mtime_ns == first.st_mtime_ns
    assert outcomes(folder) == outcomes(certified.runs / "whole")
    assert len(outcomes(folder)) >= 6
    assert (resumed.dense, resumed.examples) == (whole.dense, whole.examples)
    for mine, other in zip(resumed.outcomes, whole.outcomes, strict=True):
        assert replace(mine, export={}) == replace(other, export={})
    again = run(certified, resume=True)  # everything is there
    assert [replace(each, export={}) for each in again.outcomes] == [
        replace(each, export={}) for each in whole.outcomes
    ]
    other = run(replace(certified, plan=replace(certified.plan, seed=1), name="other"))  # control
    assert other.outcomes != whole.outcomes


def test_a_signal_stops_at_the_next_step(config: PruneConfig, monkeypatch) -> None:
    """The density that was under way leaves nothing behind."""
    prune = pruning_run.prune

    def interrupted(*args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return prune(*args, **options)

    monkeypatch.setattr(pruning_run, "prune", interrupted)
    with pytest.raises(StoppedError, match="stopped by SIGINT; 0 of 2 densities are saved"):
        run(config)
    assert {path.name for path in config.folder.iterdir()} == {"settings.json", DENSE}


def interrupting(after: int) -> Callable[[], Any]:
    """Signals that ask to stop at a question of that number, and from then on."""
    asked: list[None] = []

    def requested() -> str | None:
        asked.append(None)
        return "SIGINT" if len(asked) > after else None

    @contextmanager
    def requests() -> Iterator[Callable[[], str | None]]:
        yield requested

    return requests


def test_a_signal_stops_the_dense_training(config: PruneConfig, monkeypatch) -> None:
    """Of a network that is not trained to the end nothing is kept, and the run goes on from the start."""
    steps: list[int] = []
    train = pruning_run.train_dense

    def counted(*args: Any, **options: Any) -> list[float]:
        losses = train(*args, **options)
        steps.append(len(losses))
        return losses

    monkeypatch.setattr(pruning_run, "train_dense", counted)
    with monkeypatch.context() as patch:
        patch.setattr(pruning_run, "stop_requests", interrupting(10))
        with pytest.raises(StoppedError, match="stopped by SIGINT; 0 of 2 densities are saved"):
            run(config)
    assert {path.name for path in config.folder.iterdir()} == {"settings.json"}
    resumed = run(config, resume=True)
    assert steps == [10, 60]
    assert resumed.dense == run(replace(config, name="whole")).dense


def test_a_signal_stops_iterative_magnitude_pruning(config: PruneConfig, monkeypatch) -> None:
    plan = replace(config.plan, start="iterative_magnitude", learning=replace(SHORT, learn="both", steps=40))
    config, done = replace(config, densities=(0.5,), plan=plan), []
    learn = pruning.learn

    def counted(*args: Any, **options: Any) -> Any:
        return learn(*args, **{**options, "advanced": done.append})

    monkeypatch.setattr(pruning, "learn", counted)
    run(replace(config, dense=replace(config.dense, train_steps=0), name="whole"))
    whole = len(done)
    assert whole == 40 * 5  # four rounds, then the masks
    done.clear()
    config = replace(config, dense=replace(config.dense, train_steps=0))
    monkeypatch.setattr(pruning_run, "stop_requests", interrupting(50))
    with pytest.raises(StoppedError, match="stopped by SIGINT; 0 of 1 densities are saved"):
        run(config)
    assert len(done) == 49  # one question came before
    assert {path.name for path in config.folder.iterdir()} == {"settings.json", DENSE}


def test_an_error_in_the_second_density_keeps_the_first(config: PruneConfig, monkeypatch) -> None:
    run(replace(config, name="whole"))
    prune = pruning_run.prune

    def failing(model: Any, evidence: Any, plan: Plan, **options: Any) -> Any:
        if plan.density == 0.2:
            raise DivergedError("the loss is nan at step 3")
        return prune(model, evidence, plan, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pruning_run, "prune", failing)
        with pytest.raises(DivergedError):
            run(config)
    assert not (config.folder / "density-0.2").exists()
    run(config, resume=True)
    assert outcomes(config.folder) == outcomes(config.runs / "whole")


def test_a_folder_is_neither_replaced_nor_mixed_up(config: PruneConfig) -> None:
    config = replace(config, densities=(0.5,))
    run(config)
    before = outcomes(config.folder)
    with pytest.raises(InputError, match="already holds a run; pass --resume to go on with it, --overwrite"):
        run(config)
    other = replace(config, plan=replace(config.plan, start="random"))
    with pytest.raises(InputError, match="resume with the same settings or choose another name"):
        run(other, resume=True)
    with pytest.raises(InputError, match="has densities = "):
        run(replace(config, densities=(0.5, 0.2)), resume=True)
    assert outcomes(config.folder) == before
    run(other, overwrite=True)
    assert outcomes(config.folder) != before
    (config.folder / DENSE).write_bytes(b"cut short")
    with pytest.raises(InputError, match=f"{DENSE} is damaged; remove it to train the network again"):
        run(other, resume=True)


def loaded(changed: Callable[[Examples], None]) -> Callable[[Data], Examples]:
    """A way to load examples that changes some of them."""
    load = Data.load

    def spoiled(self: Data) -> Examples:
        examples = load(self)
        changed(examples)
        return examples

    return spoiled


def test_the_network_and_its_scale_come_from_prior_examples_alone(
    certified: PruneConfig, monkeypatch
) -> None:
    """A huge pixel in any other example changes no bit of the dense network, nor of the prior."""
    config = replace(certified, densities=(0.5,), plan=replace(certified.plan, start="snip"))
    split = evidence_of(config, config.data.load()).split
    assert split is not None
    run(replace(config, name="plain"))

    def dense_with(name: str, index: int, **changes: Any) -> bytes:
        def huge(examples: Examples) -> None:
            examples.x[index] += 1e4
            examples.y[index] = (examples.y[index] + 1) % 10

        with monkeypatch.context() as patch:
            patch.setattr(Data, "load", loaded(huge))
            run(replace(config, name=name, **changes))
        return (config.runs / name / DENSE).read_bytes()

    plain = (config.runs / "plain" / DENSE).read_bytes()
    held_out = int(config.data.load().held_out[0])
    assert dense_with("bound", int(split.bound[0])) == plain
    assert dense_with("held-out", held_out) == plain
    assert dense_with("prior", int(split.prior[0])) != plain  # control
    run(replace(config, name="all", certify=False))
    everything = (config.runs / "all" / DENSE).read_bytes()
    assert dense_with("all-bound", int(split.bound[0]), certify=False) != everything
    assert dense_with("all-held-out", held_out, certify=False) == everything


def test_without_prior_examples_the_network_is_that_of_the_seed(certified: PruneConfig, tmp_path) -> None:
    config = replace(certified, prior_fraction=0.0, densities=(0.5,))
    found = run(config)
    assert found.examples == {"prior": 0, "bound": 240, "held_out": 60}
    state = build(Network("mlp", (1, 8, 8), 10, (20,)), 0).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in load_file(config.folder / DENSE).items())
    made = found.outcomes[0].guarantee
    assert made is not None
    assert (made.fixed, made.posterior.prior_examples) == (None, 0)
    with pytest.raises(InputError, match="the score snip needs prior examples"):
        run(replace(config, plan=replace(config.plan, start="snip"), name="snip"))
    assert not (config.runs / "snip").exists()
    table = replace(config, data=Data(data=iris(tmp_path), target="kind"), name="table")
    with pytest.raises(InputError, match=r"the scale of iris\.csv is not known before its numbers are seen"):
        run(table)
    assert not (config.runs / "table").exists()


def iris(folder: Path) -> Path:
    """The flowers with their kinds in words."""
    data: Any = load_iris()
    path = folder / "iris.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([*(name.split(" (")[0] for name in data.feature_names), "kind"])
        rows = zip(data.data, data.target, strict=True)
        writer.writerows([*row, data.target_names[kind]] for row, kind in rows)
    return path


def test_a_table_with_classes_in_words(certified: PruneConfig, tmp_path: Path) -> None:
    config = replace(
        certified,
        data=Data(data=iris(tmp_path), target="kind", leave_out=("sepal width",)),
        dense=Dense(widths=(16,), train_steps=150, train_rate=1e-2),
        densities=(0.5,),
    )
    found = run(config)
    assert found.title == "mlp 16 on iris.csv"
    assert found.examples == {"prior": 60, "bound": 60, "held_out": 30}
    assert found.dense <= 0.2
    place = config.folder / "density-0.5"
    about = json.loads((place / "network.json").read_text())
    assert about["classes"] == ["setosa", "versicolor", "virginica"]
    assert about["full"]["size"] == [3]
    examples = config.data.load()
    scaling = load_scaling(place)
    assert scaling is not None
    prior = evidence_of(config, examples).prior
    assert torch.equal(scaling.mean, examples.x[prior].mean(0))
    flowers = scaling(examples.x[examples.held_out]).float()
    wrong = load_pruned(place)(flowers).argmax(-1) != examples.y[examples.held_out]
    assert found.outcomes[0].fixed == float(wrong.double().mean())


def write_idx(path: Path, array: np.ndarray) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_images_of_the_format_of_mnist(config: PruneConfig, tmp_path: Path, model: str) -> None:
    """Two classes: the bright side is left or right. The test set that comes along is held out."""
    folder, random = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for part, count in (("train", 120), ("t10k", 40)):
        labels = np.arange(count) % 2
        images = random.integers(0, 120, (count, 8, 8))
        images[labels == 0, :, :4] += 100
        images[labels == 1, :, 4:] += 100
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)
    widths = (4,) if model == "cnn" else (20,)
    config = replace(
        config,
        model=model,
        data=Data(data=folder),
        dense=Dense(widths=widths, train_steps=60, train_rate=1e-2),
        plan=replace(config.plan, structure="neurons"),
        densities=(0.5,),
    )
    found = run(config)
    assert found.examples == {"prior": 120, "bound": 0, "held_out": 40}
    assert found.title.startswith(f"{model} {widths[0]} on ")
    assert found.dense < 0.1
    outcome = found.outcomes[0]
    assert len(outcome.layers) == 1  # the last one is left whole
    place = config.folder / "density-0.5"
    small, whole = load_pruned(place, small=True), load_pruned(place)
    assert sum(value.numel() for value in small.parameters()) == outcome.export["small_parameters"]
    assert outcome.export["speed"]["ratio"] > 0
    x = evidence_of(config, config.data.load()).x
    torch.testing.assert_close(small(x), whole(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"densities": ()}, "numbers that differ in six digits, at least one, got none"),
        ({"densities": (0.5, 0.5)}, "differ in six digits, at least one, got 0.5, 0.5"),
        ({"densities": (0.1, 0.10000001)}, "differ in six digits"),  # their folders would be one
        ({"densities": (0.5, 0.0)}, "the density must be more than 0 and at most 1, got 0.0"),
        ({"densities": (0.5, 1e-6)}, "keeps no unit of the model"),
        ({"dense": Dense(train_steps=-1)}, "training the network needs steps ≥ 0"),
        ({"dense": Dense(train_rate=0.0)}, "and a rate above 0, got 1500, 128 and 0.0"),
        ({"model": "forest"}, "unknown network 'forest'; choose one of mlp, cnn"),
        ({"prior_fraction": 1.0}, "from 0 to below 1, not 1.0"),
        ({"prior_fraction": -0.1}, "from 0 to below 1, not -0.1"),
        ({"certify": True, "prior_fraction": 0.99}, "a bound set of 8 examples or more, not 2"),
        ({"bounding": Bounding(draws=1)}, "at least two draws, got 1"),
        (
            {"plan": Plan(structure="2:4")},
            "2:4 keeps 0.5 of the weights; a density of 0.2 is out of its reach",
        ),
        ({"plan": Plan(structure="1:5"), "densities": (0.2,)}, "are not a multiple of the 5 of 1:5"),
        ({"plan": Plan(batch=0)}, "a batch needs at least one example, got 0"),
        ({"data": Data(count=1)}, "count must be at least 2 examples"),
        ({"name": "a/b"}, "a run's name must be a plain folder name, got 'a/b'"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    config: PruneConfig, tmp_path: Path, changes: dict, words: str
) -> None:
    with pytest.raises(InputError) as error:
        run(replace(config, **changes))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert ". " not in str(error.value)
    assert list(tmp_path.iterdir()) == []
