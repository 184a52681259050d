"""Every benchmark runs, at sizes that say nothing of speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from raywgen.benchmarks import ambiguous_tasks, few_shot_parts, igpg_tasks, igpg_zoo
from raywgen.benchmarks.ink import with_ink_of
from raywgen.benchmarks.run import run
from raywgen.benchmarks.trained import trained_zoo
from raywgen.tasks.image_tasks import images_of
from raywgen.training.session import ray_session

SHARED = Path(__file__).parents[2] / "../shared/data"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    """A benchmark takes the session that is there: several of these would start one of their own for each corpus."""
    with ray_session():
        yield


@pytest.fixture
def zoos_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zoos are trained by this process, to the same values as by Ray's, each of which takes seconds to start."""
    for module in (ambiguous_tasks, few_shot_parts, igpg_tasks, igpg_zoo):
        monkeypatch.setattr(module, "trained_zoo", partial(trained_zoo, distributed=False))


def test_corpus_ingest(tmp_path: Path) -> None:
    small = ["num_blocks=1", "num_medium=0", "num_small=30", "rounds=1", f"folder={tmp_path}"]
    figures = run(["corpus-ingest", *small])["figures"]
    assert figures.keys() == {
        "ratio_to_copy",
        "ratio_to_copy_one_process",
        "small_safetensors_per_second",
        "small_pt_per_second",
    }
    assert all(value > 0 for value in figures.values())


def test_corpus_stream() -> None:
    settings = ["num_checkpoints=4", "num_values=300000", "batch_size=32", "num_batches=3", "rounds=1", "num_steps=4"]
    result = run(["corpus-stream", "num_small=30", *settings])
    assert result["figures"]["ragged_ratio"] > 0
    assert result["figures"]["checkpoints_ratio"] > 0
    assert ("first_batch_ratio" in result["figures"]) != ("first_batch" in result["conditions"])
    assert result["figures"]["peak_anon_gib"] < result["conditions"]["data_limit_gib"]
    assert 0 <= result["figures"]["exposed_wait"] < 1


def test_zoo_fit() -> None:
    result = run(["zoo-fit", "num_steps=3", "rounds=1", "num_cnns=2", "networks_per_actor=1"])
    assert {"speedup_cnn", "speedup_mlp", "speedup_head", "speedup_sam", "efficiency_2_actors"} == set(
        result["figures"]
    )
    assert all(case["relative_difference"] < 1e-4 for case in map(result["conditions"].get, ("cnn", "mlp", "sam")))


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
def test_zoo_quality(tmp_path: Path) -> None:
    data = [f"data={SHARED}/mnist-train.parquet", f"test_data={SHARED}/mnist-test.parquet"]
    small = ["num_networks=3", "num_sam=2", "num_steps=30", "num_iterations=3", f"folder={tmp_path}"]
    figures = run(["zoo-quality", *data, *small])["figures"]
    assert 20 < figures["accuracy_mean"] < 100
    assert figures["eigenvalue_plain"] > 0


FEW_SHOT = [
    *("data=digits", "group=", "way=2", "shot=2", "num_query=3", "num_episodes=6", "num_validation=4", "num_workers=0"),
    *("reptile_episodes=2", "reptile.num_meta_steps=1", "encoder_episodes=4", "encoder_way=8", "num_tasks=12"),
    *("mcdi.denoiser.num_steps=2", "task_loss.num_steps=2"),
]


@pytest.mark.usefixtures("zoos_here")
def test_few_shot(tmp_path: Path) -> None:
    result = run(["few-shot", *FEW_SHOT, "methods=[mcdi,mcdi_task_loss,regression]", f"out={tmp_path}"])
    figures, (conditions,) = result["figures"], result["conditions"]["each_seed"]
    for name in ("mcdi", "mcdi_task_loss", "regression", "reptile", "prototypes", "gradient_head"):
        assert 0 <= figures[name] <= 100
        assert figures[f"ms_{name}"] > 0 if name != "prototypes" else f"ms_{name}" not in figures
    assert figures.keys() >= {"adapt", "encoder_ridge", "support_ridge", "shuffled_adapt", "shuffled_mcdi"}
    assert figures["over_prototypes"] == pytest.approx(figures["mcdi"] - figures["prototypes"], abs=1e-3)
    assert conditions["half_width_95"].keys() >= {"mcdi", "reptile", "prototypes", "over_prototypes"}


@pytest.mark.usefixtures("zoos_here")
def test_lohp_stands_in_the_table_of_mcdi(tmp_path: Path) -> None:
    small = ["generator=lohp", "lohp.policy.num_steps=2", "reptile_episodes=0", "methods=[lohp,cloning,mcdi]"]
    figures = run(["few-shot", *FEW_SHOT[:-2], "mcdi.denoiser.num_steps=2", *small, f"out={tmp_path}"])["figures"]
    assert {"lohp", "cloning", "mcdi", "prototypes", "ms_lohp", "ms_batch64_lohp"} <= figures.keys()
    assert figures["over_prototypes"] == pytest.approx(figures["lohp"] - figures["prototypes"], abs=1e-3)


def test_lohp_horizon() -> None:
    small = ["length=6", "seeds=1", "max_steps=20", "learning_rates=[0.01]", "gradient_points=[0,2]"]
    figures = run(["lohp-horizon", *small, "gradient_batches=4", "num_samples=50"])["figures"]
    assert {"steps_sub_trajectory", "steps_ratio_trajectory", "gradient_variance_ratio_at_2", "steps_hybrid"} <= set(
        figures
    )


@pytest.mark.usefixtures("zoos_here")
def test_domains(tmp_path: Path) -> None:
    few = ["methods=[mcdi,mcdi_task_loss]", "reptile_episodes=0"]
    figures = run(["domains", *FEW_SHOT, *few, "domains=[plain,invert,rotate-45]", f"out={tmp_path}"])["figures"]
    for name in ("mcdi", "adapt", "shuffled_adapt", "average", "nearest", "no_adaptation"):
        assert figures[name] == pytest.approx((figures[f"{name}/invert"] + figures[f"{name}/rotate-45"]) / 2, abs=1e-3)
    assert figures["over_nearest"] == pytest.approx(figures["mcdi"] - figures["nearest"], abs=1e-3)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
@pytest.mark.usefixtures("zoos_here")
def test_transfer(tmp_path: Path) -> None:
    digits = images_of("digits", None, None, None)
    # On white paper, unlike the digits that everything is trained on.
    white = with_ink_of(replace(digits, x_SCHW=255 - digits.x_SCHW), f"{SHARED}/mnist-test.parquet", tmp_path / "white")
    held_out = f"held_out=[{white},{SHARED}/cifar10-test.parquet]"
    few = ["methods=[mcdi,mcdi_task_loss]", "reptile_episodes=2"]
    figures = run(["transfer", *FEW_SHOT, held_out, *few, f"out={tmp_path}"])["figures"]
    # A head that was never trained gives all classes the same output.
    assert figures["no_adaptation/mnist-test"] == figures["no_adaptation/cifar10-test"] == 50
    for name in ("mcdi", "adapt", "reptile", "reptile_head", "from_scratch", "features_ridge", "support_ridge"):
        assert 0 <= figures[f"{name}/cifar10-test"] <= 100
        assert figures[f"ms_{name}"] > 0
    # Photographs have no paper: only MNIST was inverted, and class means of pixels do not mind.
    assert "unmatched_mcdi/cifar10-test" not in figures
    assert figures["unmatched_raw_pixels/mnist-test"] == figures["raw_pixels/mnist-test"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
@pytest.mark.usefixtures("zoos_here")
def test_igpg_tasks(tmp_path: Path) -> None:
    data = [f"data={SHARED}/mnist-test.parquet", f"test_data={SHARED}/mnist-test.parquet"]
    few = "tasks.limit=300,tasks.test_limit=50,num_steps=6,'checkpoint_steps=[0,3,6]'"
    zoos = [
        f"zoo=[{few},num_seen_tasks=6,num_validation_tasks=2,num_unseen_tasks=3]",
        f"domains_zoo=[{few},seeds_per_task=2,'tasks.domains=[plain,invert,rotate-30,rotate-60]',tasks.num_unseen_domains=2]",
    ]
    igpg = ["igpg.tokenizer.num_steps=2", "igpg.prior.num_steps=2", "igpg.task_loss.num_steps=1"]
    small = ["igpg.task_loss.batch_size=2", "steps=1", "shot=2", "best_of=2", "num_workers=0", f"out={tmp_path}"]
    small += ["igpg.tokenizer.quantiser={num_levels: 2, num_codes: 16}", "igpg.prior={width: 16, num_heads: 2}"]
    figures = run(["igpg-tasks", *data, *zoos, *igpg, *small])["figures"]
    for prefix in ("unseen", "domain"):
        assert all(0 <= figures[f"{prefix}_{name}"] <= 100 for name in ("generated", "token_prior", "hypernetwork"))
    assert {f"{start}_{how}" for start in ("shared", "own") for how in ("coherent", "independent", "shuffled")} <= set(
        figures
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
@pytest.mark.usefixtures("zoos_here")
def test_ambiguous_tasks(tmp_path: Path) -> None:
    data = [f"data={SHARED}/mnist-test.parquet", f"test_data={SHARED}/mnist-test.parquet", "characters=digits"]
    zoo = (
        "zoo=[num_seen_tasks=4,num_validation_tasks=2,num_unseen_tasks=2,num_steps=12,"
        "'checkpoint_steps=[0,4,8,12]',tasks.limit=400,tasks.test_limit=50]"
    )
    heads = "group=,way=2,encoder_episodes=4,encoder_way=8,num_tasks=12,mcdi.denoiser.num_steps=2,task_loss.num_steps=2"
    few = [
        f"few_shot=[{heads}]",
        "whole=[mcdi.denoiser.num_steps=2,task_loss.num_steps=2]",
        "methods=[igpg,mcdi]",
        "steps=2",
    ]
    igpg = ["igpg.tokenizer.num_steps=2", "igpg.prior.num_steps=2", "igpg.task_loss.num_steps=1"]
    igpg += ["igpg.tokenizer.quantiser={num_levels: 2, num_codes: 16}", "igpg.prior.width=16", "igpg.prior.num_heads=2"]
    small = ["shots=[1]", "num_networks=2", "temperatures=[1.0]", "noises=[0.1]", "num_workers=0", f"out={tmp_path}"]
    result = run(["ambiguous-tasks", *data, zoo, *few, *igpg, *small])
    figures = result["figures"]
    for kind in ("subsets", "characters"):
        for row in ("hypernetwork", "members", "noise", "igpg", "mcdi"):
            assert all(0 <= figures[f"{kind}_1_{row}_{key}"] <= 100 for key in ("best", "mixture", "calibration"))
            assert figures[f"{kind}_1_{row}_likelihood"] < 0 < figures[f"{kind}_1_{row}_ms"]
        # One network is its own best, and its own mixture.
        assert figures[f"{kind}_1_hypernetwork_best"] == figures[f"{kind}_1_hypernetwork_mixture"]
        assert set(result["conditions"][f"{kind}_1"]["over_members"]) == {"hypernetwork", "noise", "igpg", "mcdi"}


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
def test_whole_network(tmp_path: Path) -> None:
    data = [f"data={SHARED}/mnist-test.parquet", f"test_data={SHARED}/mnist-test.parquet"]
    zoo = (
        "zoo=[num_seen_tasks=4,num_validation_tasks=2,num_unseen_tasks=2,num_steps=12,"
        "'checkpoint_steps=[0,4,8,12]',tasks.limit=400,tasks.test_limit=50]"
    )
    steps = ("mcdi.denoiser", "task_loss", "lohp.policy", "lohp_task_loss")
    small = [*(f"{each}.num_steps=2" for each in steps), "rates=[0.01]", "num_workers=0", f"out={tmp_path}"]
    figures = run(["whole-network", *data, zoo, *small])["figures"]
    assert 10 < figures["random"] < 30
    assert figures["ms_mcdi"] > figures["ms_regression"] > 0
    for name in ("mcdi_task_loss", "lohp_task_loss"):
        assert figures[f"time_ratio_{name}"] > 0
        assert 0 <= figures[f"shuffled_{name}"] <= 100


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
@pytest.mark.usefixtures("zoos_here")
def test_igpg_zoo(tmp_path: Path) -> None:
    data = [f"data={SHARED}/mnist-test.parquet", f"test_data={SHARED}/mnist-test.parquet", f"out={tmp_path}"]
    zoo = (
        "zoo=[seeds_per_task=5,num_steps=12,'checkpoint_steps=[8,12]',execution=sequential,stack_size=5,"
        "tasks.limit=400,tasks.test_limit=50]"
    )
    stages = ",".join(f"generator.{stage}.num_steps=2" for stage in ("tokenizer", "prior", "task_loss"))
    sizes = "generator.tokenizer.chunk_length=128,generator.tokenizer.quantiser.num_levels=2"
    sizes += ",generator.tokenizer.quantiser.num_codes=8"
    ladder = ["ladder.num_networks=2", "ladder.finetuned=1", "ladder.finetune_epochs=[1,2]", "ladder.averaged=[2,3]"]
    few = ["heldout=0.4", "branch_steps=4", "align=true", "ladder.noise_levels=[0.1,0.5]"]
    result = run(["igpg-zoo", *data, zoo, f"igpg=[{stages},{sizes}]", *ladder, *few])
    figures = result["figures"]
    rows = ("original", "reconstructed", "generated", "token_prior", "finetuned_1", "finetuned_2", "random", "average")
    for start in ("own", "shared", "branched"):
        for name in (*rows, "gaussian", "noise", "random_finetuned_2"):
            assert 0 <= figures[f"{start}_{name}"] <= 100
        assert figures[f"{start}_ratio"] == pytest.approx(
            figures[f"{start}_generated"] / figures[f"{start}_original"], abs=1e-3
        )
        for name in ("novelty", "original_novelty", "noise_novelty", "average_novelty", "overlap"):
            assert figures[f"{start}_{name}"] >= 0
        assert result["conditions"][start]["training_networks"] == 3
        assert result["conditions"][start]["heldout_networks"] == 2
    assert result["conditions"]["published_epoch_0"]["best"] == 86.7


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
def test_quality(tmp_path: Path) -> None:
    network = f"dir={SHARED}/pretrained/cifar10-resnet20.safetensors"
    few = ["num_images=200", "num_unlabelled=50", "levels=[2,16]", "tokenizer.num_steps=2"]
    result = run(["quality", network, f"data={SHARED}/cifar10-test.parquet", *few, f"out={tmp_path}"])
    figures = result["figures"]
    assert (figures["bits_2"], figures["bits_16"]) == (1, 8)
    for num_levels in (2, 16):
        assert 0 < figures[f"snr_db_{num_levels}"] < figures[f"limit_db_{num_levels}"] + 1
    assert figures["snr_db_16"] > figures["snr_db_2"] + 15
    # Of 200 images one is half a point.
    assert abs(figures["lost_16"]) < 4 < figures["lost_2"]
    assert result["conditions"]["original"]["cifar10-resnet20"] > 70


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
def test_batch_statistics(tmp_path: Path) -> None:
    name = "cifar10-resnet20"
    paths = [f"dir={SHARED}/pretrained/{name}.safetensors", f"data={SHARED}/cifar10-test.parquet", f"out={tmp_path}"]
    figures = run(["batch-statistics", *paths, "num_images=200", "nums=[128]", "batch_sizes=[16,128]"])["figures"]
    for row in ("published", "once_128", "by_16_128"):
        assert figures[f"{name}_{row}"] > 60
    assert figures[f"{name}_by_128_128_off"] == 0
    # Smaller batches differ, but by far less than networks that have nothing in common, which differ by about 140.
    assert 0 < figures[f"{name}_by_16_128_off"] < 20
    assert figures["largest_loss"] == pytest.approx(
        max(0.0, figures[f"{name}_once_128"] - figures[f"{name}_by_16_128"])
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
def test_igpg_pretrained(tmp_path: Path) -> None:
    networks = SHARED / "pretrained"
    paths = [
        f"dir={networks}/cifar10-resnet20.safetensors",
        f"heldout={networks}/cifar10-resnet32.safetensors",
        f"data={SHARED}/cifar10-test.parquet",
        f"test_data={SHARED}/cifar10-test.parquet",
    ]
    trellis = ["codec.state_bits=6", "low_bits.state_bits=6"]
    few = ["num_images=200", "num_beside=50", "num_unlabelled=50"]
    steps = ["generator.tokenizer.num_steps=2", "generator.prior.num_steps=2"]
    tiny = ["generator.prior.width=16", "generator.prior.num_heads=2", "generator.prior.num_layers=1"]
    figures = run(["igpg-pretrained", *paths, *trellis, *few, *steps, *tiny, f"out={tmp_path}"])["figures"]
    # Of 200 images one is half a point; published networks lose about ten points on these images.
    assert figures["original"] > 70
    assert figures["reconstructed"] > figures["original"] - 4
    assert figures["heldout_reconstructed"] > figures["heldout_original"] - 4
    assert figures["bits_per_value"] <= 4.25
    assert figures["low_bits_per_value"] <= 2
    assert figures["snr_gap_db"] < 1.5
    assert figures["low_bits_snr_db"] > figures["low_bits_round_to_nearest_snr_db"]
    assert figures["igpg_reconstructed_reestimated"] > figures["generated_reestimated"]
    assert 0 <= figures["generated_agreement"] < 0.5
    assert figures["generated_novelty"] > 0.5
