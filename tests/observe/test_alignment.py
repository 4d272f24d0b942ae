import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gramian.errors import InputError
from gramian.observe.alignment import Alignment, Checks, align
from gramian.observe.renaming import Renaming, natural, own_names, suggestion
from gramian.observe.series import find_series
from saved_series import aligned, drawn, model, names, refused, remarks, saved, steps


def test_all_that_agrees_is_taken(tmp_path: Path):
    found = aligned(tmp_path, [model(0), model(1), model(2)])
    assert names(found) == ["embed.weight", "layers.2.weight", "layers.10.weight", "norm.bias"]
    assert found.remarks == ()
    assert steps(found) == [0, 1, 2]
    for tensor in found.tensors:
        assert tensor.shape == tuple(model(0)[tensor.name].shape)
        for index, stored in enumerate(tensor.stored):
            out = torch.empty(tensor.numel)
            stored.read(0, out)
            assert out.equal(model(index)[tensor.name].reshape(-1))


def test_what_was_left_out_of_the_series_is_a_remark(tmp_path: Path):
    saved(tmp_path, [model(0), model(1)])
    save_file(model(2), tmp_path / "final.safetensors")
    found = align(find_series([tmp_path])[0])
    assert "final" in found.remarks[0].sentence
    assert found.remarks[0].kind == "series"


def test_a_missing_tensor(tmp_path: Path):
    other = model(1)
    del other["layers.2.weight"]
    models = [model(0), other, model(2)]
    refused(
        r"step1\.safetensors lacks the tensor layers\.2\.weight of .*step0\.safetensors; pass --mismatch "
        "leave_out to leave such tensors out$",
        tmp_path,
        models,
    )
    found = aligned(tmp_path, models, mismatch="leave_out")
    assert names(found) == ["embed.weight", "layers.10.weight", "norm.bias"]
    (remark,) = found.remarks
    assert (remark.kind, remark.names) == ("left_out", ("layers.2.weight",))
    assert f"{100 * 220 / 236:.4g} % of the parameters" in remark.sentence


def test_a_tensor_more_in_one_of_them(tmp_path: Path):
    refused(
        r"step0\.safetensors lacks the tensor extra\.weight of .*step1",
        tmp_path,
        [model(0), model(1, extra__weight=drawn(3))],
    )


def test_a_reshaped_tensor(tmp_path: Path):
    models = [model(0), model(1), model(2) | {"embed.weight": drawn(64, 4)}]
    refused(
        r"the tensor embed\.weight has shape \(50, 4\) in .*step0\.\w+ and \(64, 4\) in .*step2\.\w+; "
        "pass --mismatch leave_out",
        tmp_path,
        models,
    )
    found = aligned(tmp_path, models, mismatch="leave_out")
    assert names(found) == ["layers.2.weight", "layers.10.weight", "norm.bias"]
    assert "left_out" in remarks(found)


def test_differences_are_counted(tmp_path: Path):
    other = {name: value for name, value in model(1).items() if "layers" not in name}
    refused("one of 2 tensors with such differences", tmp_path, [model(0), other])


def test_a_retyped_tensor(tmp_path: Path):
    models = [model(0), {name: value.bfloat16() for name, value in model(1).items()}]
    for mismatch in ("refuse", "leave_out"):
        refused(
            r"tensor embed\.weight has dtype float32 in .*step0\.\w+ and bfloat16 in .*step1\.\w+, one of "
            "4 tensors with such differences; pass --mixed-dtypes",
            tmp_path,
            models,
            mismatch=mismatch,
        )
    found = aligned(tmp_path, models, mixed_dtypes=True)
    assert len(found.tensors) == 4
    assert len(remarks(found)["retyped"]) == 4


def test_a_tensor_that_is_of_whole_numbers_in_one_of_them(tmp_path: Path):
    models = [model(0), model(1) | {"norm.bias": torch.arange(4)}]
    for mixed in (False, True):
        refused(r"norm\.bias has dtype float32 in .* and int64 in", tmp_path, models, mixed_dtypes=mixed)
    found = aligned(tmp_path, models, mismatch="leave_out")
    assert "norm.bias" not in names(found)


def test_different_architectures(tmp_path: Path):
    other = {f"conv.{index}": drawn(3, 3, 2) for index in range(3)}
    for mismatch in ("refuse", "leave_out"):
        refused(
            r"step0\.safetensors and .*step2\.safetensors have no tensor .* of different architectures$",
            tmp_path,
            [model(0), model(1), other],
            mismatch=mismatch,
        )


def test_one_architecture_of_two_widths(tmp_path: Path):
    wide = {name: drawn(*(2 * size for size in value.shape)) for name, value in model(0).items()}
    refused("different architectures", tmp_path, [model(0), wide])


def test_a_renamed_tensor_gets_a_suggestion_that_works(tmp_path: Path):
    other = model(1)
    other["final_norm.bias"] = other.pop("norm.bias")
    with pytest.raises(InputError) as caught:
        aligned(tmp_path, [model(0), other])
    (rule,) = re.findall(r"--rename '(.+?)'", str(caught.value))
    assert set(rule.split("=")) == {"final_norm.bias", "norm.bias"}
    assert len(aligned(tmp_path, [model(0), other], rename=(rule,)).tensors) == 4


@pytest.mark.parametrize(
    ("before", "after"), [("model.", "transformer."), ("", "model."), ("model.", ""), ("a.b.", "c.")]
)
@pytest.mark.parametrize("common", [False, True])
def test_a_renamed_prefix_gets_a_suggestion_that_works(tmp_path: Path, before: str, after: str, common: bool):
    both = {"head": drawn(7)} if common else {}
    models = [
        {f"{before}{name}": value for name, value in model(0).items()} | both,
        {f"{after}{name}": value for name, value in model(1).items()} | both,
    ]
    with pytest.raises(InputError, match="lacks" if common else "different architectures, unless") as caught:
        aligned(tmp_path, models)
    (rule,) = re.findall(r"--rename '(.+?)'", str(caught.value))
    assert rule.count("*") == 2
    assert len(aligned(tmp_path, models, rename=(rule,)).tensors) == 4 + common


def test_no_suggestion_of_another_shape(tmp_path: Path):
    other = model(1)
    del other["norm.bias"]
    other["final_norm.bias"] = drawn(5)
    with pytest.raises(InputError, match="lacks the tensor") as caught:
        aligned(tmp_path, [model(0), other])
    assert "--rename" not in str(caught.value)


@pytest.mark.parametrize("rule", ["", "a", "=", "a=", "=b", "a*=b", "a=b*", "a=b=c", "*a=*b"])
def test_rules_that_are_none(rule: str):
    with pytest.raises(InputError, match=r"is neither OLD=NEW nor OLD\.\*=NEW\.\*"):
        Checks(rename=(rule,)).check()


def test_rules():
    exact, prefix, add, cut = (Renaming.of(rule) for rule in ("a.b=c", "a.*=x.y.*", "*=m.*", "m.*=*"))
    assert [exact.renamed(name) for name in ("a.b", "a.b.c")] == ["c", "a.b.c"]
    assert [prefix.renamed(name) for name in ("a.b", "aa.b", "a")] == ["x.y.b", "aa.b", "a"]
    assert (add.renamed("a"), cut.renamed("m.a")) == ("m.a", "a")


def test_a_rule_that_fits_nothing_or_joins_two(tmp_path: Path):
    models = [model(0), model(1)]
    refused("the renaming 'nothing=x' fits no tensor", tmp_path, models, rename=("nothing=x",))
    refused(
        r"step0\.\w+ has two tensors for norm\.bias: ",
        tmp_path,
        models,
        rename=("layers.2.weight=norm.bias",),
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(tmp_path: Path, prefix: str):
    models = [model(0), {f"{prefix}{name}": value for name, value in model(1).items()}]
    found = aligned(tmp_path, models)
    assert names(found) == ["embed.weight", "layers.2.weight", "layers.10.weight", "norm.bias"]
    assert len(remarks(found)["wrapped"]) == 4


def test_own_names():
    assert own_names(["a._orig_mod.b", "_fsdp_wrapped_module.c"]) == {
        "a._orig_mod.b": "a.b",
        "_fsdp_wrapped_module.c": "c",
    }
    assert own_names(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}  # a module of that name
    assert own_names([]) == {}


def test_natural_order():
    ordered = ["a", "a.2.b", "a.10", "a.10.b", "b1", "b01x", "b2"]
    assert sorted(reversed(ordered), key=natural) == ordered


def test_buffers_are_left_out(tmp_path: Path):
    mask = torch.ones(1, 1, 6, 6).tril()
    buffers = {
        "bn__running_mean": drawn(4),
        "bn__running_var": drawn(4),
        "bn__num_batches_tracked": torch.tensor(3),
        "attn__rotary__inv_freq": drawn(2),
        "h__0__attn__bias": mask,
        "gpt__0__attention__bias": mask.bool(),
        "h__0__attn__masked_bias": torch.tensor(-1e4),
        "embeddings__position_ids": torch.arange(5)[None],
        "opt__exp_avg_sq": drawn(4),
        "nothing": torch.empty(0, 3),
    }
    found = aligned(tmp_path, [model(0, **buffers), model(1)])
    assert len(found.tensors) == 4
    assert set(remarks(found)["buffers"]) == {name.replace("__", ".") for name in buffers}


def test_parameters_that_are_named_like_buffers(tmp_path: Path):
    other = {"attn__bias": drawn(12), "attn__bias_k": drawn(1, 1, 4, 4), "mask_token": drawn(1, 1, 4)}
    found = aligned(
        tmp_path, [model(0, **other), model(1, **{name: 2 * value for name, value in other.items()})]
    )
    assert len(found.tensors) == 7
    assert found.remarks == ()


def test_whole_numbers_are_listed(tmp_path: Path):
    found = aligned(tmp_path, [model(0, table=torch.arange(3)), model(1, flags=torch.tensor([True]))])
    assert remarks(found) == {"integers": ("flags", "table")}
    assert found.remarks[0].sentence.endswith("hold no real numbers: 2 tensors, such as flags")
    assert len(found.tensors) == 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32])
def test_quantised_weights(tmp_path: Path, dtype: torch.dtype):
    quantised = {"layers.weight": drawn(40, 40).to(dtype), "layers.scale": drawn(40)}
    short = str(dtype).removeprefix("torch.")
    refused(
        rf"most of .*step1\.safetensors is {short}, so it is quantised: dequantise it first",
        tmp_path,
        [{"layers.weight": drawn(40, 40), "layers.scale": drawn(40)}, quantised],
    )


def test_patterns_of_names(tmp_path: Path):
    models = [model(0), model(1)]
    assert names(aligned(tmp_path, models, only=("layers.*", "norm.*"))) == [
        "layers.2.weight",
        "layers.10.weight",
        "norm.bias",
    ]
    assert names(aligned(tmp_path, models, skip=("*.bias",), only=("*",)))[-1] == "layers.10.weight"
    refused("the pattern 'layer.*' fits no tensor, such as embed.weight", tmp_path, models, only=("layer.*",))
    refused("no tensors are left", tmp_path, models, skip=("*",))


def test_what_is_skipped_may_differ(tmp_path: Path):
    models = [model(0), model(1) | {"embed.weight": drawn(64, 4)}]
    assert len(aligned(tmp_path, models, skip=("embed.*",)).tensors) == 3


def test_choices_that_there_are_not():
    with pytest.raises(InputError, match="mismatch is 'ignore'; accepted are refuse and leave_out"):
        Checks(mismatch="ignore").check()
    with pytest.raises(InputError, match="duplicates is 'no'; accepted are refuse and keep_one"):
        Checks(duplicates="no").check()


def test_the_place_in_a_torch_file_is_said(tmp_path: Path):
    found = aligned(tmp_path, [{"model_state_dict": model(0)}, {"model_state_dict": model(1)}], ".pt")
    assert found.remarks[0].sentence == "weights were read from the entry model_state_dict"


def test_sketches_of_different_recordings(tmp_path: Path):
    def recorded(*about: dict[str, str]) -> Alignment:
        paths = [tmp_path / f"step-{index}.safetensors" for index in range(2)]
        for index, (path, said) in enumerate(zip(paths, about, strict=True)):
            save_file({"layer": drawn(5, seed=index)}, path, said)
        return align(find_series(paths)[0])

    one = {"mode": "sketch", "seed": "0"}
    assert len(recorded(one, one).tensors) == 1
    for other in ({"mode": "sketch", "seed": "1"}, {}, {"mode": "exact", "seed": "0"}):
        with pytest.raises(InputError, match="are not sketches of one recording"):
            recorded(one, other)
    assert len(recorded({"mode": "exact"}, {}).tensors) == 1


def test_suggestions():
    assert suggestion({}, {"a": (1,)}) is None
    assert suggestion({"a": (1,)}, {"b": (2,)}) is None
    assert (
        suggestion({"head.weight": (1,)}, {"tail.bias": (1,), "my.head.weight": (1,)})
        == "my.head.weight=head.weight"
    )
    both = {"m.1.w": (1,), "m.2.w": (1,)}
    assert suggestion(both, {"t.1.w": (1,), "t.2.w": (1,)}) == "t.*=m.*"
