"""What reads files in gramian, with small valid ones of each kind; imports come with the call."""

import gzip
import io
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from fuzzing import Files, Loader
from gramian.errors import InputError
from mutations import (
    BYTES,
    CANARY,
    Bomb,
    cells,
    digits,
    elements,
    fields,
    gzipped,
    lines,
    npy,
    pickled,
    repacked,
    safetensors,
    smiles,
    words,
)

SAFE, JSON, NPY, NPZ = (safetensors,), (fields, fields, fields, digits), (npy,), (repacked(npy),)
TORCH = (repacked(pickled), repacked(pickled), pickled)
CSV, TEXT, JSONL, SMILES = (
    (cells, cells, lines),
    (words, lines, digits),
    (fields, fields, lines),
    (smiles, lines),
)
MOST = 1 << 20
"""Elements of the largest tensor that is read after it was found."""


def _torch(value: Any) -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _safe(tensors: Mapping[str, Any], about: dict[str, str] | None = None) -> bytes:
    from safetensors.torch import save

    return save(dict(tensors), about)


def _npy(values: Any) -> bytes:
    import numpy as np

    stream = io.BytesIO()
    np.save(stream, np.asarray(values))
    return stream.getvalue()


def _npz(compressed: bool = False, **arrays: Any) -> bytes:
    import numpy as np

    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _written(write: Callable[[Path], object]) -> dict[str, bytes]:
    """Return the files that a function writes into a folder."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        write(Path(place))
        return _tree(Path(place))


def _tensors(seed: int = 0) -> dict[str, Any]:
    import torch

    draw = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(3, 4, generator=draw),
        "a.bias": torch.randn(3, generator=draw).bfloat16(),
        "steps": torch.tensor(7),
    }


# weights of checkpoints


def _weights() -> list[Files]:
    return [{"a.safetensors": _safe(_tensors(), {"step": "30"})}]


def _torch_weights() -> list[Files]:
    state = _tensors()
    return [
        {"a.pt": _torch(state)},
        {"a.pt": _torch({"model": {"state_dict": state}, "step": 3, "t": state["a.weight"].T})},
    ]


def _reads_weights(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        import torch

        from gramian.observe.weight_files import metadata, open_weights

        path = folder / name
        metadata(path)
        for stored in open_weights([path]).values():
            if stored.numel > 16 * path.stat().st_size:
                raise AssertionError(f"{stored.numel} elements are announced")
            stored.read(0, torch.empty(min(stored.numel, MOST), dtype=stored.dtype))

    return read


def _series() -> list[Files]:
    one, two = _safe(_tensors(0), {"step": "1"}), _safe(_tensors(1), {"global_step": "2"})
    index = {"metadata": {"total_size": 10}, "weight_map": dict.fromkeys(_tensors(), "model-1.safetensors")}
    shards = {"model.safetensors.index.json": json.dumps(index).encode(), "model-1.safetensors": one}
    hub = "models--a--b"
    return [
        {"checkpoint-1/model.safetensors": one, "checkpoint-2/model.safetensors": two},
        {
            "x/state.json": b'{"step": 1}',
            "x/model.safetensors": one,
            "y/trainer_state.json": b'{"global_step": 5, "log": []}',
            "y/model.safetensors": two,
        },
        {f"step{step}/{name}": content for step in "12" for name, content in shards.items()},
        {
            f"{hub}/refs/step1": b"0" * 40,
            f"{hub}/refs/step2": b"1" * 40,
            f"{hub}/snapshots/{'0' * 40}/model.safetensors": one,
            f"{hub}/snapshots/{'1' * 40}/model.safetensors": two,
        },
    ]


def _read_series(folder: Path) -> None:
    from gramian.observe.series import find_series
    from gramian.observe.weight_files import open_weights

    place = folder / "models--a--b" if (folder / "models--a--b").is_dir() else folder
    for series in find_series([place]):
        for each in series.checkpoints:
            open_weights(each.files)


def _sketches() -> list[Files]:
    import torch
    from torch import nn

    from gramian.observe.recorder import TrajectoryRecorder

    def write(folder: Path) -> None:
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))
        recorder = TrajectoryRecorder(model, folder, size=128)
        for step in range(2):
            recorder.record(step)
            with torch.no_grad():
                model[0].weight += 1

    return [_written(write)]


def _read_sketches(folder: Path) -> None:
    from gramian.observe.recorder import read_sketches

    read_sketches(folder).steps()


def _grams() -> list[Files]:
    import torch

    plan = {"files": [["a", 1, 2]], "units": [64]}
    found = {f"{unit}/{part}/0": torch.ones(3, 2, dtype=torch.float64) for unit in (0, 1) for part in (0, 1)}
    return [{"plan.json": json.dumps(plan).encode(), "found-0-000000-000001.safetensors": _safe(found)}]


def _read_grams(folder: Path) -> None:
    from gramian.observe.saved_grams import SavedGrams

    saved = SavedGrams(folder, {"files": [["a", 1, 2]], "units": [64]})
    saved.totals()


# runs


def _model() -> Any:
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


def _optimiser(model: Any) -> Any:
    import torch

    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def _training() -> list[Files]:
    import torch

    from gramian.train.checkpoint import save

    def write(folder: Path) -> None:
        model = _model()
        optimiser = _optimiser(model)
        model(torch.ones(2, 4)).sum().backward()
        optimiser.step()
        save(folder, 3, model, optimiser, {"best": 1.0, "tokens": 5})

    return _with_and_without_manifest(_written(write))


def _with_and_without_manifest(files: Files) -> list[Files]:
    """Return files twice: damage is seen by checksums, or not before a file is read."""
    return [files, {name: content for name, content in files.items() if not name.endswith("manifest.json")}]


def _read_training(folder: Path) -> None:
    from gramian.train.checkpoint import checkpoints, load

    model = _model()
    for each in checkpoints(folder):
        load(each, model, _optimiser(model))


def _run() -> list[Files]:
    settings = {"settings": {"name": "a", "steps": 3, "shape": {"width": 4}}, "versions": {"torch": "2"}}
    rows = b"".join(json.dumps({"kind": "train", "step": n, "loss": 1.5}).encode() + b"\n" for n in range(4))
    result = {"name": "a", "loss": 1.25, "blocks": [{"name": "sas", "loss": 1}]}
    files = {"settings.json": settings, "result.json": result}
    return [{**{name: json.dumps(each).encode() for name, each in files.items()}, "readings.jsonl": rows}]


def _read_run(folder: Path) -> None:
    from gramian.train.run import Run

    run = Run(folder)
    run.record.read()
    _ = run.settings, run.versions, run.result()


def _shape() -> dict[str, Any]:
    sizes = {"vocabulary": 300, "context": 8, "width": 8, "depth": 1, "heads": 2, "mlp_width": 8}
    return {**sizes, "block": "pre_norm"}


def _saved() -> list[Files]:
    from gramian.data.tokens import load_corpus
    from gramian.nn.transformer import Transformer, TransformerConfig
    from gramian.tasks.saved_model import describe, publish
    from gramian.train.checkpoint import save
    from gramian.train.run import Run

    def write(folder: Path) -> None:
        (folder / "story.txt").write_text("once upon a time there was a cat. " * 30 + "\nthe end\n")
        corpus = load_corpus(folder / "story.txt", vocabulary=260, cache=False)
        (folder / "story.txt").unlink()
        shape = TransformerConfig(**_shape())
        describe(folder, shape, corpus.tokenizer)
        model = Transformer(shape)
        save(folder / "checkpoints", 3, model, _optimiser(model), {"best": 1.0})
        publish(Run(folder))

    return _with_and_without_manifest(_written(write))


def _read_saved(folder: Path) -> None:
    from gramian.tasks.saved_model import open_saved, tokenizer_of, trained_model

    run = open_saved(folder)
    trained_model(run)
    tokenizer_of(run).encode("a cat")


def _read_saved_shape(folder: Path) -> None:
    from gramian.tasks.saved_model import open_saved, shape_of

    shape_of(open_saved(folder))


def _read_saved_tokenizer(folder: Path) -> None:
    from gramian.tasks.saved_model import open_saved, tokenizer_of

    tokenizer_of(open_saved(folder)).encode("a cat")


# Hugging Face


def _hugging_face() -> list[Files]:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokens = {name: each for name, each in _saved()[0].items() if name.startswith("tokenizer")}
    small = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 300, "n_positions": 8}
    llama = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}

    def of(model: Any) -> dict[str, bytes]:
        return {**_written(lambda folder: model.save_pretrained(folder)), **tokens}

    return [
        of(GPT2LMHeadModel(GPT2Config(**small))),
        of(LlamaForCausalLM(LlamaConfig(vocab_size=300, **llama))),
    ]


def _read_configuration(folder: Path) -> None:
    from gramian.tasks.model_folder import configuration, kind_of, quiet

    with quiet():
        kind_of(folder, configuration(folder))


def _read_hugging_face(folder: Path) -> None:
    import torch

    from gramian.tasks.model_folder import check_files, check_finite, configuration, kind_of, loaded, quiet

    with quiet():
        check_files(folder)
        config = configuration(folder)
        opener, _ = kind_of(folder, config)
        check_finite(folder, loaded(folder, config, opener, torch.float32), "float32")


def _read_tokenizer(folder: Path) -> None:
    from gramian.tasks.model_folder import quiet, tokenizer_of

    with quiet():
        tokenizer_of(folder)("a cat")


# what was fitted or kept


def _network() -> Any:
    from torch import nn

    return nn.Linear(3, 2)


def _ensemble() -> list[Files]:
    import torch

    from gramian.bayes.ensemble import fit_ensemble
    from gramian.bayes.members import EnsembleConfig

    def write(folder: Path) -> None:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        fit_ensemble(_network, x, x[:, :2], EnsembleConfig(members=2, steps=2)).save(
            folder / "a.safetensors", note="x"
        )

    return [_written(write)]


def _read_ensemble(folder: Path) -> None:
    from gramian.bayes.trained import Ensemble, facts_of

    facts_of(folder / "a.safetensors")
    Ensemble.load(folder / "a.safetensors", _network)


def _pruned() -> list[Files]:
    from gramian.tasks.pruning_networks import Network, build

    network = Network("mlp", (4,), 2, (3,))
    about = {"name": "mlp", "size": [4], "classes": 2, "widths": [3]}
    described = {
        "full": about,
        "small": about,
        "reason": None,
        "mean": [0.0] * 4,
        "scale": [1.0] * 4,
        "classes": [],
    }
    weights = _safe(build(network, 0).state_dict())
    files = {"pruned.safetensors": weights, "small.safetensors": weights}
    return [{"network.json": json.dumps(described).encode(), **files}]


def _read_pruned(folder: Path) -> None:
    from gramian.tasks.pruning_files import load_pruned, load_scaling

    load_pruned(folder)
    load_pruned(folder, small=True)
    load_scaling(folder)


def _kept() -> list[Files]:
    import torch

    from gramian.imaging.kept import kept_matrix

    return [_written(lambda folder: kept_matrix(_beam(), "linear", torch.float32, folder))]


def _beam() -> Any:
    from gramian.imaging.geometry import ParallelBeam, evenly

    return ParallelBeam(evenly(3), 4, 6)


def _read_kept(folder: Path) -> None:
    import torch

    from gramian.imaging.kept import kept_matrix

    kept_matrix(_beam(), "linear", torch.float32, folder)


def _tokens() -> list[Files]:
    from gramian.data import tokens
    from gramian.data.text import Document

    sides = [[Document("a", "the cat and the hat. " * 20)], [Document("b", "the end")]]
    return [_written(lambda folder: tokens._save(folder / "a.safetensors", *tokens._build(sides, 260)))]


def _read_tokens(folder: Path) -> None:
    from gramian.data.tokens import _load

    if _load(folder / "a.safetensors") is None:
        raise InputError("kept tokens that are damaged are made again")


# tables


def _csv() -> list[Files]:
    rows = (
        "1,red,round,1",
        "2,blue,square,2",
        "3,green,round,3",
        "4,red,square,4",
        "5,red,round,5",
        "6,blue,round,6",
    )
    mixed = "\n".join(("size,colour,shape,y", *rows, ""))
    return [
        {"a.csv": mixed.encode()},
        {"a.csv": "\n".join(f"{n};{n * n % 7};{n / 3};{n % 2}" for n in range(12)).encode()},
        {"a.tsv": mixed.replace(",", "\t").encode()},
    ]


def _read_table(folder: Path) -> None:
    from gramian.data.tables import load_rows, load_table

    path = folder / ("a.tsv" if folder.name == "2" else "a.csv")
    load_rows(path, load_table(path, "4" if folder.name == "1" else "y"))


def _table_npz() -> list[Files]:
    import numpy as np

    x, y = np.arange(12.0).reshape(4, 3) % 5, np.array([1.0, 2, 4, 3])
    index = {"train_index": np.array([[0, 1]]), "test_index": np.array([[2, 3]])}
    return [{"a.npz": _npz(X=x, y=y, **index)}, {"a.npz": _npz(True, X=x.astype("f4"), y=y.astype("i2"))}]


def _read_npz(folder: Path) -> None:
    from gramian.data.tables import load_table

    load_table(folder / "a.npz", "y")


def _parquet() -> list[Files]:
    import pyarrow
    import pyarrow.parquet

    def write(folder: Path, **more: Any) -> None:
        words = ["red", "blue", "red", "blue"]
        table = pyarrow.table(
            {"x": [1.0, 2, 3, 5], "w": words, "y": [3, 4, 5, 6], "text": ["once", "a", "", None]}
        )
        pyarrow.parquet.write_table(table, folder / "a.parquet", **more)

    return [
        _written(lambda folder: write(folder)),
        _written(lambda folder: write(folder, compression="gzip")),
    ]


def _read_parquet(folder: Path) -> None:
    from gramian.data.tables import load_table

    load_table(folder / "a.parquet", "y", leave_out=("text",))


# text


def _jsonl() -> list[Files]:
    rows = [
        {"text": "once upon a time", "n": 1},
        {"text": "a cat\n", "n": None},
        {"text": None},
        {"text": "end"},
    ]
    return [{"a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}]


def _plain() -> list[Files]:
    return [{"a.txt": "once upon a time\nthere was a cat – and ٣ hats\n".encode(), "b/c.md": b"the end\n"}]


def _reads_text(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from gramian.data import text

        text.split(
            text.sample(text.read([folder / name if name else folder], "text", "**/*"), 10**6).documents
        )

    return read


# images and scans


def _array() -> list[Files]:
    import numpy as np

    return [{"a.npy": _npy(np.arange(12.0).reshape(3, 4))}, {"a.npy": _npy(np.arange(6, dtype=">i2"))}]


def _read_array(folder: Path) -> None:
    from gramian.imaging.arrays import read_array

    read_array(folder / "a.npy")


def _scan() -> list[Files]:
    import numpy as np

    random = np.random.default_rng(0)
    views, angles = random.random((12, 16)), np.arange(12.0) * 15
    text = "\n".join(f"{angle:g}" for angle in angles).encode()
    image = random.random((8, 8))
    return [
        {"y.npy": _npy(views), "angles": text},
        {"y.npy": _npy(views.astype("f4")), "angles": _npy(angles)},
        {"x.npy": _npy(image)},
    ]


def _read_scan(folder: Path) -> None:
    from gramian.tasks.scan_files import in_radians, kind_of, read_angles, read_image, read_sinogram

    if folder.name == "2":  # the sample of an image
        kind_of(str(folder / "x.npy"))
        read_image(folder / "x.npy")
        return
    kind_of(str(folder / "y.npy"))
    read_sinogram(folder / "y.npy", in_radians(read_angles(folder / "angles")), None)


def _images() -> list[Files]:
    import numpy as np

    random = np.random.default_rng(0)
    images, labels = random.integers(0, 255, (12, 5, 5), np.uint8), np.arange(12) % 3
    test = {"test_images": images[:4], "test_labels": labels[:4]}
    return [
        {"a.npz": _npz(images=images, labels=labels)},
        {"a.npz": _npz(True, images=random.random((12, 5, 5, 3)), labels=labels.astype("u1"))},
        {"a.npz": _npz(images=images, labels=labels, **test)},
    ]


def _read_images(folder: Path) -> None:
    from gramian.data.images import load_images

    load_images(folder / "a.npz")


def _idx() -> list[Files]:
    import numpy as np

    images = np.random.default_rng(0).integers(0, 255, (12, 5, 5), np.uint8)
    content = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in images.shape) + images.tobytes()
    labels = b"\0\0\x08\x01\0\0\0\x0c" + bytes(n % 3 for n in range(12))
    pair = {"train-images-idx3-ubyte": content, "train-labels-idx1-ubyte": labels}
    return [pair, {f"{name}.gz": gzip.compress(each, mtime=0) for name, each in pair.items()}]


def _read_folder_of_images(folder: Path) -> None:
    from gramian.data.images import load_images

    load_images(folder)


def _dicom_bytes() -> bytes:
    import pydicom
    from pydicom.data import get_testdata_file

    small = pydicom.dcmread(str(get_testdata_file("CT_small.dcm", download=False)))
    small.PixelData = small.pixel_array[40:56, 40:56].tobytes()
    small.Rows = small.Columns = 16
    stream = io.BytesIO()
    small.save_as(stream)
    return stream.getvalue()


def _dicom() -> list[Files]:
    return [{"a.dcm": _dicom_bytes()}]


def _elements() -> list[tuple[int, int, int, int]]:
    """Return where the top elements of the DICOM sample lie, all in explicit little-endian form."""
    content, at, found = _dicom_bytes(), 132, []
    while at + 8 <= len(content):
        long = content[at + 4 : at + 6] in (b"OB", b"OW", b"SQ", b"UN", b"UT", b"OF")
        place, width = (at + 8, 4) if long else (at + 6, 2)
        end = place + width + int.from_bytes(content[place : place + width], "little")
        if end > len(content):
            break
        found.append((at, place, width, end))
        at = end
    return found


@cache
def _element_damage() -> Any:
    return elements(_elements())


def _element(random: Random, content: bytes) -> bytes:
    return _element_damage()(random, content)


def _read_dicom(folder: Path) -> None:
    from gramian.imaging.dicom import read_slice

    read_slice(folder / "a.dcm")


# graphs


def _graph_arrays() -> list[Files]:
    import numpy as np

    laid_out = {
        "x": np.array([[0.5], [1], [2], [3], [4], [5]]),
        "edge_index": np.array([[0, 1, 1, 2, 0, 1], [1, 0, 2, 1, 1, 0]], np.int16),
        "edge_types": np.array([0, 0, 1, 1, 0, 0], np.uint8),
        "node_ptr": np.array([0, 3, 4, 6], np.int32),
        "edge_ptr": np.array([0, 4, 4, 6], np.int32),
        "y": np.array([1, -1, 1]),
        "train": np.array([0]),
        "val": np.array([1]),
        "test": np.array([2]),
        "task": np.array("classification"),
    }
    collection = {
        "edge_index": np.array([[0, 1, 1, 2, 4, 5], [1, 0, 2, 1, 5, 4]]),
        "graph_indicator": np.array([0, 0, 0, 1, 2, 2]),
        "node_labels": np.array([3, 5, 3, 9, 5, 5]),
        "node_attributes": np.array([0.5, 1, 2, 3, 4, 5]),
        "graph_attributes": np.array([1.5, -1, 1]),
    }
    return [{"a.npz": _npz(**laid_out)}, {"a.npz": _npz(True, **collection)}]


def _reads_graphs(name: str, **given: Any) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from gramian.data.graph_files import load_graphs

        load_graphs(folder / name if name else folder, **given)

    return read


def _graph_text() -> list[Files]:
    files = {
        "A": "1, 2\n2, 1\n2, 3\n3, 2\n5, 6\n6, 5\n",
        "graph_indicator": "1\n1\n1\n2\n3\n3\n",
        "graph_labels": "1\n-1\n1\n",
        "node_labels": "3, 0\n5, 1\n3, 1\n9, 0\n5, 0\n5, 0\n",
        "node_attributes": "0.5\n1e3\n-2\n3\n4\n5\n",
        "edge_labels": "0\n0\n1\n1\n0\n0\n",
    }
    return [{f"T_{name}.txt": text.encode() for name, text in files.items()}]


def _graph_tensors() -> list[Files]:
    import torch
    from torch_geometric.data import Data

    edges = torch.tensor([[0, 1], [1, 0]])
    records = [
        Data(x=torch.randn(3, 2), edge_index=edges, y=torch.tensor([n % 2]), edge_attr=torch.tensor([0, 1]))
        for n in range(3)
    ]
    data, slices = _collated(records)
    plain = {name: value for name, value in data.to_dict().items()}
    return [{"a.pt": _torch((data, slices))}, {"a.pt": _torch((plain, slices))}, {"a.pt": _torch(records)}]


def _collated(records: Sequence[Any]) -> tuple[Any, Any]:
    from torch_geometric.data import InMemoryDataset

    return InMemoryDataset.collate(list(records))


def _molecules() -> list[Files]:
    table = "smiles,y\nCCO,1.5\nc1ccccc1,2\nC[C@H](N)C(=O)O,-1\n[Na+].[Cl-],0\nC/C=C/C,3\n"
    listed = 'id,smiles,labels\na,CCO,"[0, 1]"\nb,CC(C)C,"[1, 1]"\nc,C#N,"[0, 0]"\n'
    return [
        {"a.csv": table.encode()},
        {"a.csv": listed.encode()},
        {"a.smi": b"CCO one\nc1ccccc1 two\nCC(=O)O\nO\n"},
    ]


def _read_molecules(folder: Path) -> None:
    from gramian.data.molecules import load_molecules

    if folder.name == "2":  # the sample without columns
        load_molecules(folder / "a.smi", "HeavyAtomCount")
    else:
        load_molecules(folder / "a.csv")


def _gzipped_molecules() -> list[Files]:
    import numpy as np

    split = _npz(train=np.array([0, 1]), val=np.array([2]), test=np.array([3, 4]))
    return [{"a.csv.gz": gzip.compress(_molecules()[0]["a.csv"], mtime=0), "a_splits.npz": split}]


def _read_gzipped(folder: Path) -> None:
    from gramian.data.molecules import load_molecules

    load_molecules(folder / "a.csv.gz")


# planted


def _planted(wrong: Callable[[], object]) -> Loader:
    return Loader(lambda: [{"a.json": b'{"a": 1}'}], lambda folder: wrong(), {".json": JSON}, control=True)


def _raise(error: Exception) -> None:
    raise error


def _swallowed() -> None:
    try:
        bytearray(10**15)
    except MemoryError as error:
        raise InputError("too large") from error


def _unpickled() -> None:
    import pickle

    pickle.loads(pickle.dumps(Bomb(CANARY)))


def _endless() -> None:
    while True:
        pass


CONTROLS: dict[str, Callable[[], object]] = {
    "good": lambda: _raise(InputError("this is wrong; that is accepted")),
    "trace": lambda: {}["x"],
    "silent": lambda: _raise(InputError("")),
    "swallowed": _swallowed,
    "large": lambda: bytearray(3 * 2**30),
    "slow": _endless,
    "waiting": lambda: time.sleep(600),
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "code": _unpickled,
    "program": lambda: os.system("true"),
}
"""Loaders that do wrong, all of which but `good` have to be found."""

LOADERS: dict[str, Loader] = {
    "weights-safetensors": Loader(_weights, _reads_weights("a.safetensors"), {".safetensors": SAFE}),
    "weights-torch": Loader(_torch_weights, _reads_weights("a.pt"), {".pt": TORCH}),
    "checkpoint-series": Loader(_series, _read_series, {".json": JSON, ".safetensors": SAFE, "step1": TEXT}),
    "trajectory-record": Loader(_sketches, _read_sketches, {".safetensors": SAFE}),
    "trajectory-grams": Loader(_grams, _read_grams, {".json": JSON, ".safetensors": SAFE}),
    "training-checkpoint": Loader(_training, _read_training, {".json": JSON, ".safetensors": SAFE}),
    "run-json": Loader(_run, _read_run, {".json": JSON, ".jsonl": JSONL}),
    "run-config": Loader(_saved, _read_saved_shape, {"config.json": JSON}),
    "run-tokenizer": Loader(_saved, _read_saved_tokenizer, {"tokenizer.json": JSON}),
    "run-model": Loader(_saved, _read_saved, {"config.json": JSON, ".safetensors": SAFE}),
    "hugging-face-config": Loader(
        _hugging_face, _read_configuration, {"/config.json": (), "config.json": JSON}
    ),
    "hugging-face-tokenizer": Loader(
        _hugging_face, _read_tokenizer, {"tokenizer.json": JSON, "tokenizer_config.json": JSON}
    ),
    "hugging-face-model": Loader(
        _hugging_face,
        _read_hugging_face,
        {"generation_config.json": (), "config.json": JSON, ".safetensors": SAFE},
    ),
    "ensemble": Loader(_ensemble, _read_ensemble, {".safetensors": SAFE}),
    "pruned-network": Loader(_pruned, _read_pruned, {".json": JSON, ".safetensors": SAFE}),
    "kept-projector": Loader(_kept, _read_kept, {".safetensors": SAFE}, ("scipy",)),
    "kept-tokens": Loader(_tokens, _read_tokens, {".safetensors": SAFE}),
    "table-csv": Loader(_csv, _read_table, {".csv": CSV, ".tsv": CSV}),
    "table-npz": Loader(_table_npz, _read_npz, {".npz": NPZ}),
    "table-parquet": Loader(_parquet, _read_parquet, {".parquet": BYTES}, ("pyarrow",)),
    "text-jsonl": Loader(_jsonl, _reads_text("a.jsonl"), {".jsonl": JSONL}),
    "text-parquet": Loader(_parquet, _reads_text("a.parquet"), {".parquet": BYTES}, ("pyarrow",)),
    "text-plain": Loader(_plain, _reads_text(""), {".txt": TEXT, ".md": TEXT}),
    "array-npy": Loader(_array, _read_array, {".npy": NPY}),
    "scan": Loader(_scan, _read_scan, {".npy": NPY, "angles": (*NPY, *TEXT)}),
    "dicom": Loader(_dicom, _read_dicom, {".dcm": (_element, *BYTES[:3])}, ("pydicom",)),
    "images-npz": Loader(_images, _read_images, {".npz": NPZ}),
    "images-idx": Loader(_idx, _read_folder_of_images, {"ubyte": BYTES, ".gz": (gzipped(BYTES),)}),
    "graphs-npz": Loader(_graph_arrays, _reads_graphs("a.npz"), {".npz": NPZ}),
    "graphs-torch": Loader(_graph_tensors, _reads_graphs("a.pt"), {".pt": TORCH}, ("torch_geometric",)),
    "graphs-text": Loader(_graph_text, _reads_graphs(""), {".txt": (*TEXT, cells)}),
    "smiles": Loader(_molecules, _read_molecules, {".csv": (*SMILES, *CSV), ".smi": SMILES}, ("rdkit",)),
    "smiles-gzip": Loader(
        _gzipped_molecules, _read_gzipped, {".gz": (gzipped((*SMILES, *CSV)),), ".npz": NPZ}, ("rdkit",)
    ),
    **{f"planted-{name}": _planted(wrong) for name, wrong in CONTROLS.items()},
}
