"""Exports: what was written is what was pruned, bit for bit, and smaller where whole features are gone."""

import gzip
import json
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gramian.compress.masks import add_masks, draw, keep, masks_of, set_mode
from gramian.compress.structures import Rows
from gramian.errors import InputError
from gramian.tasks.pruning_data import Data, standardised, standardiser
from gramian.tasks.pruning_files import (
    ABOUT,
    PRUNED,
    SMALL,
    TIMED,
    load_pruned,
    load_scaling,
    measure_speed,
    write_pruned,
)
from gramian.tasks.pruning_networks import Network, build

MLP = Network("mlp", (1, 8, 8), 10, (12, 9))
NETWORKS = {
    "mlp": MLP,
    "cnn of 8 x 8": Network("cnn", (1, 8, 8), 10, (6, 5)),
    "cnn of 28 x 28": Network("cnn", (1, 28, 28), 10, (4, 6)),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(network: Network, count: int = 20) -> Tensor:
    return torch.randn(count, *network.size, generator=seeded())


def dense_of(network: Network) -> nn.Sequential:
    """A network whose biases are not zero, so that what is constant counts."""
    model = build(network, 0).eval()
    for value in model.parameters():
        if value.ndim == 1:
            nn.init.normal_(value, std=0.3, generator=seeded(1))
    return model


def pruned(dense: nn.Sequential, structure: str = "weights", density: float = 0.7) -> nn.Sequential:
    """The network with random masks: every third feature of the hidden layers, or a share of all weights."""
    model = deepcopy(dense)
    last = str(len(model) - 1)
    if structure == "neurons":
        add_masks(model, exclude=[last], structure=Rows())
        keep(model, {name: torch.arange(len(mask.kept)) % 3 > 0 for name, mask in masks_of(model).items()})
    else:
        add_masks(model)
        units = masks_of(model).items()
        keep(
            model, {name: torch.rand(mask.kept.shape, generator=seeded(2)) < density for name, mask in units}
        )
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "export"


@pytest.mark.parametrize("structure", ["weights", "neurons"])
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_what_is_loaded_computes_what_was_pruned(folder: Path, network: Network, structure: str) -> None:
    dense, x = dense_of(network), inputs(network)
    model = pruned(dense, structure)
    expected = model(x)
    found = write_pruned(folder, model, network, dense)
    loaded = load_pruned(folder)
    assert torch.equal(loaded(x), expected)
    assert not torch.equal(loaded(x), dense(x))
    assert torch.equal(model(x), expected)  # the model itself is as it was
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in dense.named_parameters()}
    assert not loaded.training
    assert found.parameters == sum(value.numel() for value in dense.parameters()) == found.nonzero_before
    assert found.nonzero == sum(int((value != 0).sum()) for value in loaded.parameters())
    assert found.bytes == (folder / PRUNED).stat().st_size
    assert found.compressed == len(gzip.compress((folder / PRUNED).read_bytes(), mtime=0))
    assert found.compressed < found.compressed_before
    assert (found.small is None) == (structure == "weights")


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_the_smaller_network_is_equal_to_rounding(folder: Path, network: Network) -> None:
    dense, x = dense_of(network), inputs(network)
    model = pruned(dense, "neurons")
    found = write_pruned(folder, model, network, dense)
    small = load_pruned(folder, small=True)
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    assert found.small is not None
    assert found.reason is None
    assert all(new < old for new, old in zip(found.small.widths, network.widths, strict=True)) or (
        network.name == "cnn"
    )
    assert found.small_parameters == sum(value.numel() for value in small.parameters()) < found.parameters
    assert found.small_bytes == (folder / SMALL).stat().st_size < found.bytes
    assert [value.shape for value in build(found.small, 0).parameters()] == [
        value.shape for value in small.parameters()
    ]
    with torch.no_grad():
        small[-1].bias.zero_()  # control: what the constant features come to counts
    assert (small(x) - model(x)).abs().max() > 1e-2


def test_without_whole_features_there_is_no_smaller_network_and_a_reason(folder: Path) -> None:
    dense = dense_of(MLP)
    found = write_pruned(folder, pruned(dense), MLP, dense, inputs(MLP))
    assert (found.small, found.small_parameters, found.small_bytes, found.speed) == (None,) * 4
    assert "no neuron or channel is without weights" in str(found.reason)
    assert not (folder / SMALL).exists()
    with pytest.raises(InputError, match="has no smaller network: no neuron or channel is without weights"):
        load_pruned(folder, small=True)
    sparse = write_pruned(folder, pruned(dense, density=0.03), MLP, dense)
    assert sparse.small is not None  # single weights are masked, but so few are left that neurons are empty
    torch.testing.assert_close(
        load_pruned(folder, small=True)(inputs(MLP)), load_pruned(folder)(inputs(MLP)), rtol=1e-5, atol=1e-5
    )


def test_a_later_export_leaves_nothing_of_an_earlier_one(folder: Path) -> None:
    dense = dense_of(MLP)
    write_pruned(folder, pruned(dense, "neurons"), MLP, dense)
    (folder / "outcome.json").write_text("{}")
    write_pruned(folder, pruned(dense), MLP, dense)
    assert sorted(path.name for path in folder.iterdir()) == [ABOUT, "outcome.json", PRUNED]


def test_an_export_that_is_cut_short_is_no_export(folder: Path, monkeypatch) -> None:
    dense = dense_of(MLP)
    write_pruned(folder, pruned(dense), MLP, dense)

    def full_disk(*args: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gramian.tasks.pruning_files._write", full_disk)
        with pytest.raises(OSError, match="no space"):
            write_pruned(folder, pruned(dense, "neurons"), MLP, dense)
    with pytest.raises(InputError, match=r"is no export of gramian prune: it has no network\.json"):
        load_pruned(folder)
    write_pruned(folder, pruned(dense), MLP, dense)
    assert torch.equal(load_pruned(folder)(inputs(MLP)), pruned(dense)(inputs(MLP)))


def test_the_mode_is_what_is_exported(folder: Path) -> None:
    dense, x = dense_of(MLP), inputs(MLP)
    model = pruned(dense)
    for seed, mask in enumerate(masks_of(model).values()):
        nn.init.normal_(mask.logits, generator=seeded(seed))
    outputs = []
    for mode in ("kept", "threshold", "sample"):
        set_mode(model, mode)
        draw(model, seeded(5))
        write_pruned(folder, model, MLP, dense)
        outputs.append(load_pruned(folder)(x))
        assert torch.equal(outputs[-1], model(x))
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    for mode in ("mean", "moments", "relaxed", "straight_through"):
        set_mode(model, mode)
        with pytest.raises(
            InputError, match=f"'{mode}' are no mask of zeros and ones; set the mode to one of"
        ):
            write_pruned(folder, model, MLP, dense)
    assert torch.equal(load_pruned(folder)(x), outputs[-1])  # a refusal destroys nothing


def test_a_model_in_training_is_exported_in_evaluation(folder: Path) -> None:
    dense = dense_of(MLP)
    model = pruned(dense, "neurons").train()
    assert write_pruned(folder, model, MLP, dense).small is not None
    assert model.training


def test_other_models_than_the_network_are_refused(folder: Path) -> None:
    dense = dense_of(MLP)
    with pytest.raises(InputError, match="the model has no masks"):
        write_pruned(folder, dense, MLP, dense)
    wider = replace(MLP, widths=(13, 9))
    with pytest.raises(InputError, match=r"the model is not the network described, mlp 13-9: size mismatch"):
        write_pruned(folder, pruned(dense), wider, dense)
    with pytest.raises(InputError, match="the model is not the network described, mlp 12-9"):
        write_pruned(folder, pruned(dense), MLP, dense_of(wider))
    with pytest.raises(InputError, match=r"must hold finite numbers in float32, got torch\.float64"):
        write_pruned(folder, pruned(dense).double(), MLP, dense)
    assert not folder.exists()


def test_how_inputs_are_standardised_comes_along(folder: Path, tmp_path: Path) -> None:
    rows = "".join(f"{row / 7},{row * row},{'ab'[row % 2]}\n" for row in range(30))
    (tmp_path / "a.csv").write_text("p,q,y\n" + rows)
    for data, seen in (
        (Data(count=40), torch.arange(20)),
        (Data(count=40), torch.arange(0)),
        (Data(data=tmp_path / "a.csv", target="y"), torch.arange(20)),
    ):
        examples = data.load()
        network = Network("mlp", examples.size, examples.classes, (5,))
        dense = dense_of(network)
        scaling = standardiser(examples, seen)
        write_pruned(folder, pruned(dense), network, dense, scaling=scaling, names=examples.names)
        again = load_scaling(folder)
        assert again is not None
        assert torch.equal(again(examples.x).float(), standardised(examples, seen))
        assert json.loads((folder / ABOUT).read_text())["classes"] == list(examples.names)
    write_pruned(folder, pruned(dense), network, dense)
    assert load_scaling(folder) is None


def test_speed_is_measured_in_turns() -> None:
    calls: list[str] = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            calls.append(self.name)
            return x

    found = measure_speed(Named("dense"), Named("small"), torch.zeros(4, 2), rounds=4, warm_up=2)
    pairs = [tuple(calls[index : index + 2]) for index in range(0, 12, 2)]
    assert pairs == [("small", "dense"), ("dense", "small")] * 3
    assert found.examples == 4
    assert found.ratio == pytest.approx(found.dense / found.small)
    assert 0 < found.dense < 60
    for rounds, x in ((0, torch.zeros(4, 2)), (1, torch.zeros(0, 2))):
        with pytest.raises(InputError, match="timing needs a round and an example"):
            measure_speed(Named("a"), Named("b"), x, rounds=rounds)


def test_speed_and_sizes_go_to_json(folder: Path) -> None:
    dense = dense_of(MLP)
    found = write_pruned(folder, pruned(dense, "neurons"), MLP, dense, inputs(MLP, 2 * TIMED))
    assert found.speed is not None
    assert found.speed.examples == TIMED
    saved = json.loads(json.dumps(asdict(found)))
    assert saved["small"]["widths"] == list(found.small.widths)
    assert saved["speed"]["ratio"] == found.speed.ratio


def test_damaged_descriptions(folder: Path) -> None:
    dense = dense_of(MLP)
    write_pruned(folder, pruned(dense, "neurons"), MLP, dense)
    about = json.loads((folder / ABOUT).read_text())
    full = about["full"]
    for spoiled, words in (
        ([], "does not describe a network; its entries must be classes, full, mean"),
        ({**about, "more": 1}, "does not describe a network"),
        ({"full": full}, "does not describe a network"),
        ({**about, "full": None}, "does not describe a network"),
        ({**about, "full": {**full, "name": "rnn"}}, "does not describe a network: unknown network 'rnn'"),
        ({**about, "full": {**full, "name": []}}, "does not describe a network"),
        ({**about, "full": {**full, "widths": 4}}, "does not describe a network"),
        ({**about, "full": {**full, "widths": ["4"]}}, "does not describe a network: .* positive whole"),
        ({**about, "full": {**full, "depth": 4}}, "does not describe a network"),
        ({**about, "full": {**full, "widths": [12, 8]}}, r"pruned\.safetensors is not the network described"),
        ({**about, "full": {**full, "widths": [12]}}, r"pruned\.safetensors is not the network described"),
        ({**about, "full": {**full, "widths": [10**12, 10**12]}}, "is not the network described"),
    ):
        (folder / ABOUT).write_text(json.dumps(spoiled))
        with pytest.raises(InputError, match=words):
            load_pruned(folder)
    (folder / ABOUT).write_text('{"full":')
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load_pruned(folder)
    for mean, scale in (([0.0, 1.0], [1.0, 2.0, 3.0]), ("no", 1.0), ([None], [1.0]), ([[1.0], 2.0], 1.0)):
        (folder / ABOUT).write_text(json.dumps({**about, "mean": mean, "scale": scale}))
        with pytest.raises(InputError, match="does not say how inputs are standardised"):
            load_scaling(folder)
    with pytest.raises(InputError, match=r"is no export of gramian prune: it has no network\.json"):
        load_pruned(folder / "nowhere")


def test_damaged_weights(folder: Path) -> None:
    dense = dense_of(MLP)
    write_pruned(folder, pruned(dense, "neurons"), MLP, dense)
    state, whole = load_file(folder / PRUNED), (folder / PRUNED).read_bytes()
    for content in (
        b"",
        whole[:7],
        whole[: len(whole) // 2],
        whole[:-1],
        b"PK\x03\x04" + whole,
        whole + b"0",
    ):
        (folder / PRUNED).write_bytes(content)
        with pytest.raises(InputError, match=r"pruned\.safetensors cannot be read as safetensors: "):
            load_pruned(folder)
    (folder / PRUNED).unlink()
    with pytest.raises(InputError, match=r"pruned\.safetensors cannot be read: No such file"):
        load_pruned(folder)
    torch.testing.assert_close(load_pruned(folder, small=True)(inputs(MLP)).shape, torch.Size([20, 10]))
    for spoiled, words in (
        ({name: value for name, value in state.items() if name != "1.bias"}, r'Missing key.*"1\.bias"'),
        ({**state, "extra": torch.zeros(1)}, r'Unexpected key.*"extra"'),
        ({**state, "1.bias": torch.zeros(5)}, r"size mismatch for 1\.bias"),
        ({**state, "1.bias": state["1.bias"].half()}, "'1.bias' must hold finite numbers in float32, got"),
        ({**state, "1.bias": state["1.bias"] * torch.nan}, "'1.bias' must hold finite numbers"),
    ):
        save_file(spoiled, folder / PRUNED)
        with pytest.raises(InputError, match=words) as caught:
            load_pruned(folder)
        assert "\n" not in str(caught.value)
