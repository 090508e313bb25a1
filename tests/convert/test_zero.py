"""Conversion of ZeRO's optimizer state, compared with DeepSpeed's own conversion."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_llmjp.checkpoint import manifest as manifests
from megatron_llmjp.config.loading import load_config
from tests.convert.megatron_parts import FUSED, OLD, renamed
from tests.support.witness import read_state

REAL = Path(__file__).parent / "fixtures" / "mds_gpt_tp2pp2dp2_bf16z1" / "ckpt" / "global_step2"
KINDS = {"fp32": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def canonical(name: str) -> str:
    """Return megatron-core's name of a parameter; DeepSpeed numbers the layers 2 to 5."""
    if name.startswith("tied_modules.embed."):
        return name.replace("tied_modules.embed.", "embedding.")
    number, _, inner = name.partition(".")
    if number == "6":
        return f"decoder.final_layernorm.{inner}"
    return f"decoder.layers.{int(number) - 2}.{renamed(inner, OLD)}"


def state_of(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Return the optimizer tensors of a native checkpoint by kind and megatron-core's name."""
    return {
        (kind, renamed(name, FUSED)): tensor
        for kind in KINDS.values()
        for name, tensor in read_state(folder, kind).items()
    }


@pytest.fixture
def deepspeed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: load(*a, **{**k, "weights_only": False}))
    return pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


def universal(folder: Path, out: Path, monkeypatch) -> Path:
    """Create a universal checkpoint with DeepSpeed's own tool; return its ``zero`` folder."""
    from deepspeed.checkpoint import ds_to_universal

    flags = ["--input_folder", str(folder), "--output_folder", str(out),
             "--num_extract_workers", "1", "--num_merge_workers", "1"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["ds_to_universal", *flags])
    ds_to_universal.main(ds_to_universal.parse_arguments())
    return out / "zero"


def test_moments_match_deepspeed(tmp_path, convert, deepspeed, monkeypatch):
    shutil.copytree(REAL, tmp_path / "global_step2")
    zero = universal(tmp_path / "global_step2", tmp_path / "universal", monkeypatch)
    convert("--to", "native", "--with-optimizer", "--input", REAL, "--output", tmp_path / "n")
    folder = manifests.newest_checkpoint(tmp_path / "n")
    found = state_of(folder)
    names = [path for path in zero.iterdir() if path.is_dir()]
    assert len(names) == 4 * 12 + 4
    assert len(found) == 3 * len(names)
    for path in names:
        name = canonical(path.name)
        for theirs, ours in KINDS.items():
            expected = torch.load(path / f"{theirs}.pt")["param"]
            assert expected.any()
            # It keeps the true vocabulary size.
            assert torch.equal(found[ours, name][: len(expected)], expected), (name, ours)
    common = torch.load(folder / "common.pt")
    assert {group["step"] for group in common["optimizer"]["param_groups"]} == {2}
    assert common["opt_param_scheduler"]["num_steps"] == 4
    manifest = manifests.read_manifest(folder)
    assert (manifest.contents, manifest.iteration, manifest.consumed_samples) == ("full", 2, 4)
    optimizer = load_config(folder / manifests.CONFIG).optimizer
    # args has 0.999, but DeepSpeed's optimizer used another value, which is the relevant one.
    assert (optimizer.lr, optimizer.lr_decay_style, optimizer.adam_beta2) == (0.003, "linear", 0.95)


def test_deepspeed_reads_the_written_moments(tmp_path, convert, deepspeed, monkeypatch):
    """The native state converted back to ZeRO files equals the files of the real run."""
    words = ("--with-optimizer", "--target-tensor-parallel-size", 2)
    convert("--to", "native", "--input", REAL, "--output", tmp_path / "n", *words)
    convert("--to", "megatron-deepspeed", "--input", tmp_path / "n", "--output", tmp_path / "ds",
            "--target-pipeline-parallel-size", 4, *words)  # fmt: skip
    shutil.copytree(REAL, tmp_path / "global_step2")
    theirs = universal(tmp_path / "global_step2", tmp_path / "u1", monkeypatch)
    ours = universal(tmp_path / "ds" / "global_step2", tmp_path / "u2", monkeypatch)
    names = {path.name for path in theirs.iterdir() if path.is_dir()}
    assert names == {path.name for path in ours.iterdir() if path.is_dir()}
    for name in names:
        for kind in KINDS:
            real = torch.load(theirs / name / f"{kind}.pt")["param"]
            assert torch.equal(torch.load(ours / name / f"{kind}.pt")["param"], real), (name, kind)
        assert int(torch.load(ours / name / "step.pt")) == 2
    content = torch.load(tmp_path / "ds" / "global_step2" / "mp_rank_00_model_states.pt")
    assert content["lr_scheduler"]["num_steps"] == content["args"].consumed_train_samples == 4


def test_torch_reads_the_decay_as_that_of_adamw(tmp_path, convert):
    """Megatron-DeepSpeed without apex uses torch.optim.Adam, whose groups come from the file."""
    words = ("--with-optimizer", "--input", REAL, "--output", tmp_path / "ds")
    convert("--to", "megatron-deepspeed", *words)
    (path,) = (tmp_path / "ds" / "global_step2").glob("bf16_zero_*")
    content = torch.load(path, weights_only=False)["optimizer_state_dict"]
    state = content["base_optimizer_state"]
    flats = [torch.zeros_like(state["state"][g]["exp_avg"]) for g in (0, 1)]
    optimizer = torch.optim.Adam([{"params": [flat]} for flat in flats])
    optimizer.load_state_dict(state)
    assert [group["decoupled_weight_decay"] for group in optimizer.param_groups] == [True, True]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_fp16_old_numbers_and_paddings(tmp_path, convert, deepspeed):
    """The same state as saved by an fp16 run of 2023: older layer numbers, a loss scale.

    And with room between parameters, as newer versions of DeepSpeed align them.
    """
    shutil.copytree(REAL, tmp_path / "run" / "global_step2")
    folder = tmp_path / "run" / "global_step2"
    renumber(folder)
    for rank in range(4):
        rewrite(folder, rank)
    for name, source in (("bf16", REAL), ("fp16", tmp_path / "run")):
        convert("--to", "native", "--with-optimizer", "--dtype", "fp16", "--input", source,
                "--output", tmp_path / name)  # fmt: skip
    ours, theirs = (
        state_of(manifests.newest_checkpoint(tmp_path / name)) for name in ("fp16", "bf16")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    common = torch.load(manifests.newest_checkpoint(tmp_path / "fp16") / "common.pt")
    scaler = common["optimizer"]["grad_scaler"]
    assert (scaler["scale"].item(), scaler["hysteresis_tracker"]) == (4096.0, 2)
    bf16 = torch.load(manifests.newest_checkpoint(tmp_path / "bf16") / "common.pt")
    assert "grad_scaler" not in bf16["optimizer"]


def renumber(folder: Path) -> None:
    """Rename the files: layers start at 03, the final norm is two after the last one."""
    for path in sorted(folder.glob("layer_*"), reverse=True):
        number = int(path.name[6:8])
        if number > 1:
            path.rename(path.with_name(f"layer_{old_number(number):02d}{path.name[8:]}"))


def old_number(number: int) -> int:
    return number + (1 if number < 6 else 2)


def rewrite(folder: Path, rank: int) -> None:
    """Rewrite the files of one model-parallel rank: older names, padding, one more DP rank."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler.__new__(DynamicLossScaler)
    scaler.__dict__.update(cur_scale=4096.0, cur_iter=7, scale_window=1000, cur_hysteresis=2)
    path = folder / f"mp_rank_{rank:02d}_model_states.pt"
    content = torch.load(path)
    files = [folder / f"bf16_zero_pp_rank_{d}_mp_rank_{rank:02d}_optim_states.pt" for d in (0, 1)]
    states = [torch.load(file)["optimizer_state_dict"] for file in files]
    paddings = [[(3 * i) % 5 for i in range(len(group))] for group in content["param_shapes"]]

    def cut(pick) -> list[list[torch.Tensor]]:
        """By group, then by data-parallel rank."""
        found = []
        for g, shapes in enumerate(content["param_shapes"]):
            flat = torch.cat([pick(state, g) for state in states])
            parts = flat.split([shape.numel() for shape in shapes.values()])
            spread = [
                torch.nn.functional.pad(x, (0, n)) for x, n in zip(parts, paddings[g], strict=True)
            ]
            joined = torch.cat(spread)
            found.append(list(torch.nn.functional.pad(joined, (0, -len(joined) % 3)).chunk(3)))
        return found

    main = cut(lambda state, g: state["single_partition_of_fp32_groups"][g])
    moments = {
        kind: cut(lambda s, g, kind=kind: s["base_optimizer_state"]["state"][g][kind])
        for kind in ("exp_avg", "exp_avg_sq")
    }
    groups = [{**group, "step": 2} for group in states[0]["base_optimizer_state"]["param_groups"]]
    for d in range(3):
        state = {g: {kind: x[g][d].clone() for kind, x in moments.items()} for g in range(2)}
        written = {
            **states[0],
            "loss_scaler": scaler,
            "base_optimizer_state": {"state": state, "param_groups": groups},
            "single_partition_of_fp32_groups": [group[d].clone() for group in main],
            "param_alignment_paddings": paddings,
            "partition_count": [3, 3],
        }
        name = f"zero_pp_rank_{d}_mp_rank_{rank:02d}_optim_states.pt"
        torch.save({"optimizer_state_dict": written}, folder / name)
    for file in files:
        file.unlink()
    content["param_shapes"] = [
        {renumbered(n): s for n, s in g.items()} for g in content["param_shapes"]
    ]
    torch.save(content, path)


def renumbered(name: str) -> str:
    number, _, inner = name.partition(".")
    return f"{old_number(int(number))}.{inner}" if number.isdigit() else name


def test_errors_name_the_missing_state(tmp_path, convert):
    words = ("--to", "native", "--with-optimizer", "--output", tmp_path / "n", "--input")
    folder = tmp_path / "global_step2"
    shutil.copytree(REAL, folder)
    missing = "bf16_zero_pp_rank_1_mp_rank_03_optim_states.pt"
    (folder / missing).unlink()
    assert "1 of 2 data-parallel ranks" in convert(*words, folder, code=2)
    for path in folder.glob("*optim_states.pt"):
        path.unlink()
    assert "mp_rank_00 has no optimizer files" in convert(*words, folder, code=2)
    no_zero = REAL.parents[2] / "mds_llama_tp2pp2_fp32" / "ckpt"
    assert "without ZeRO" in convert(*words, no_zero, code=2)
    assert list(tmp_path.iterdir()) == [folder]


def test_rank_files_are_those_of_the_real_run(tmp_path, convert):
    """The same state, written for the same layout but one data-parallel rank instead of two."""
    convert("--to", "megatron-deepspeed", "--with-optimizer", "--input", REAL,
            "--output", tmp_path / "ds", "--target-tensor-parallel-size", 2,
            "--target-pipeline-parallel-size", 2)  # fmt: skip
    folder = tmp_path / "ds" / "global_step2"
    alone = {path.name for path in REAL.iterdir() if "_rank_1_" not in path.name}
    assert {path.name for path in folder.iterdir()} == alone
    assert (tmp_path / "ds" / "latest").read_text() == "global_step2"
    assert (tmp_path / "ds" / "latest_checkpointed_iteration.txt").read_text() == "2"
    for rank in range(4):
        name = f"mp_rank_{rank:02d}_model_states.pt"
        real, ours = (torch.load(f / name, weights_only=False) for f in (REAL, folder))
        theirs = vars(real.pop("args"))
        args = vars(ours.pop("args"))
        # Required by DeepSpeed 0.10 only; optional since then; the data-parallel size.
        assert ours.pop("sparse_tensor_module_names") == set()
        assert (ours.pop("ds_version"), ours.pop("ds_config")) == ("0.10.0", {})
        assert (ours.pop("dp_world_size"), ours["global_samples"]) == (1, 4)
        more = ["checkpoint_parallel_dimensions", "dp_world_size", "ds_config", "ds_version"]
        for key in (*more, "rng_state"):
            del real[key]
        patterns = "tp_replicated_parameter_patterns"  # in any order
        for content in (ours, real):
            content["universal_checkpoint_info"][patterns].sort()
        assert ours == real
        assert [list(shapes) for shapes in ours["param_shapes"]] == [
            list(shapes) for shapes in real["param_shapes"]
        ]
        other = {"apply_query_key_layer_scaling": False, "data_parallel_size": 1,
                 "consumed_train_samples": 4, "norm_epsilon": 1e-5}  # fmt: skip
        assert {key: args[key] for key in other} == other
        assert args == {**{key: theirs[key] for key in args if key in theirs}, **other}


def test_optimizer_files_are_those_of_the_real_run(tmp_path, convert):
    """Each parameter is where the two data-parallel ranks have it together."""
    convert("--to", "megatron-deepspeed", "--with-optimizer", "--input", REAL,
            "--output", tmp_path / "ds", "--target-tensor-parallel-size", 2,
            "--target-pipeline-parallel-size", 2)  # fmt: skip
    for rank in range(4):
        files = [
            folder / f"bf16_zero_pp_rank_{dp}_mp_rank_{rank:02d}_optim_states.pt"
            for folder, dp in ((REAL, 0), (REAL, 1), (tmp_path / "ds" / "global_step2", 0))
        ]
        contents = [torch.load(path, weights_only=False) for path in files]
        assert (contents[2].pop("ds_version"), contents[2].pop("ds_config")) == ("0.10.0", {})
        first, second, ours = (content.pop("optimizer_state_dict") for content in contents)
        assert contents[2] == {}
        half = [len(flat) for flat in first["single_partition_of_fp32_groups"]]
        for mappings, found, n in zip(
            zip(first["param_slice_mappings"], second["param_slice_mappings"], strict=True),
            ours.pop("param_slice_mappings"),
            half,
            strict=True,
        ):
            places: dict[str, tuple[int, int]] = {}
            for before, mapping in zip((0, n), mappings, strict=True):
                for name, place in mapping.items():
                    start, numel = places.get(name, (before + place.start, 0))
                    places[name] = (start, numel + place.numel)
            assert {name: (p.start, p.numel) for name, p in found.items()} == places
        flats = ours.pop("single_partition_of_fp32_groups")
        for g, flat in enumerate(flats):
            both = [f["single_partition_of_fp32_groups"][g] for f in (first, second)]
            expected = torch.cat(both).detach()
            if g == 0 and rank >= 2:  # the last stage's position embeddings, which are not used
                expected[2048:2560] = flat[2048:2560]
            assert torch.equal(flat, expected)
        state, real = ours.pop("base_optimizer_state"), first["base_optimizer_state"]
        for g, moments in state["state"].items():
            assert moments["step"] == real["state"][g]["step"] == 2
        for group, theirs in zip(state["param_groups"], real["param_groups"], strict=True):
            assert group == {key: theirs[key] for key in group}
            assert theirs.keys() - group.keys() == {
                "amsgrad", "capturable", "differentiable", "foreach", "fused", "lr_mult",
                "maximize", "name",
            }  # fmt: skip
        assert ours.pop("partition_count") == [1, 1]
        assert (ours.pop("ds_version"), ours["group_paddings"]) == ("0.10.0", [0, 0])
        assert ours == {key: first[key] for key in ("clip_grad", "group_paddings")}
