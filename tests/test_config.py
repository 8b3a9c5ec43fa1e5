"""Configs are checked at the door, and every mistake is named."""

import json
import math
import pathlib

import ml_collections
import pytest
from etils import epath

from deevisum_jax import config as config_lib
from deevisum_jax.config import Config, from_config_dict, from_file
from deevisum_jax.errors import UserError

REPO_CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def values(**changes) -> dict:
    return {
        "initialization": "from_scratch",
        "seed": 0,
        "total_steps": 10,
        "batch_size": 8,
        "data": {"dataset": "synthetic/tiny"},
        "model": {"variant": "tiny", "exit_layers": (2, 4)},
        "optim": {"learning_rate": 1e-3},
    } | changes


def build(**changes) -> Config:
    return from_config_dict(ml_collections.ConfigDict(values(**changes)))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "import ml_collections\n"
        f"def get_config():\n    return ml_collections.ConfigDict({values()!r})\n"
    )
    return str(path)


def test_defaults_fill_what_is_left_out():
    config = build()
    assert config.optim.learning_rate == 1e-3
    assert config.eval.budget == 0.15
    assert config.mesh.fsdp == -1
    assert config.loss.exit_weights is None


@pytest.mark.parametrize("path", sorted(REPO_CONFIGS.glob("*.py")), ids=lambda path: path.name)
def test_every_config_of_ours_is_whole(path):
    assert from_file(str(path)).initialization


def test_a_run_of_before_frames_were_merged_merges_none(tmp_path):
    file = epath.Path(tmp_path / "config.json")
    config_lib.save(build(), file)
    written = json.loads(file.read_text())
    assert written["model"].pop("merge")["num_keyframes"] == 0
    file.write_text(json.dumps(written))
    assert config_lib.load(file) == build()


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ({"num_keyframes": -1}, "merge.num_keyframes=-1 must be at least 0"),
        (
            {"num_keyframes": 3},
            r"num_keyframes=3 is more than data\.num_frames=2.*num_frames more, or keep fewer",
        ),
        ({"num_keyframes": 1, "tau": 1.01}, "merge.tau=1.01 must be at least -1 and at most 1"),
        ({"num_keyframes": 1, "floor": -2}, "merge.floor=-2.0 must be at least -1"),
        ({"num_keyframes": 1, "reject": "=>"}, r"merge.reject='=>'; did you mean '>'"),
        ({"num_keyframes": 1, "reference": "bug"}, r"merge.reference='bug'; .*fixed.*released"),
        ({"num_keyframes": 1, "temperature": 0}, "merge.temperature=0.0 must be above 0"),
        ({"num_keyframes": 1, "redundancy_weight": -1}, "redundancy_weight=-1.0 must be at least"),
        ({"projections": True}, "num_keyframes=0 of .*=2 merges none; set it above 0"),
        ({"projections": True, "num_keyframes": 2}, "num_keyframes=2 of .*=2 merges none"),
        ({"keyframes": 1}, "merge.keyframes does not exist; did you mean 'num_keyframes'"),
    ],
)
def test_mistakes_of_merging_are_named(merge, message):
    model = values()["model"] | {"merge": merge}
    with pytest.raises(UserError, match=message):
        build(model=model)


def test_values_are_converted_to_the_declared_types():
    config = build(optim={"learning_rate": 1, "frozen": ["img/.*"]}, loss={"exit_weights": [1, 2]})
    assert config.optim.learning_rate == 1.0
    assert isinstance(config.optim.learning_rate, float)
    assert config.optim.frozen == ("img/.*",)
    assert config.loss.exit_weights == (1.0, 2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lerning_rate": 1}, "config field lerning_rate does not exist; "),
        (
            {"optim": {"learning_rate": 1.0, "warm_steps": 3}},
            r"optim\.warm_steps does not exist; did you mean 'warmup_steps'\?",
        ),
        ({"optim": {}}, r"leaves out optim\.learning_rate; set every one"),
        ({"data": 3}, "data=3 must be a group of fields"),
        ({"seed": "0"}, "seed='0' must be of type int"),
        ({"seed": True}, "seed=True must be of type int"),
        ({"seed": 1.0}, "seed=1.0 must be of type int"),
        ({"seed": -1}, r"seed=-1 must be at least 0 and below 2\*\*32"),
        ({"seed": 2**32}, "seed=4294967296 must be"),
        (
            {"optim": {"learning_rate": "fast"}},
            r"optim\.learning_rate='fast' must be of type float",
        ),
        ({"optim": {"learning_rate": 0.0}}, r"optim\.learning_rate=0.0 must be above 0"),
        ({"optim": {"learning_rate": math.inf}}, r"learning_rate=inf must be a finite number"),
        ({"optim": {"learning_rate": math.nan}}, r"learning_rate=nan must be a finite number"),
        ({"optim": {"learning_rate": 1.0, "clip_norm": -1.0}}, r"optim\.clip_norm=-1.0 must be"),
        ({"optim": {"learning_rate": 1.0, "weight_decay": -0.1}}, "must be at least 0"),
        (
            {"optim": {"learning_rate": 1.0, "b1": 1.0}},
            r"optim\.b1=1.0 must be at least 0 and below",
        ),
        ({"optim": {"learning_rate": 1.0, "b2": -0.1}}, r"optim\.b2=-0.1 must be at least 0 and"),
        ({"optim": {"learning_rate": 1.0, "end_fraction": 1.1}}, "at least 0 and at most 1"),
        (
            {"model": {"variant": "tiny", "exit_layers": (2, "4")}},
            r"model\.exit_layers\[1\]='4' must be of type int",
        ),
        ({"model": {"variant": "tiny", "exit_layers": 4}}, r"model\.exit_layers=4 must be of type"),
        ({"model": {"variant": "tiny", "exit_layers": ()}}, r"model\.exit_layers is empty"),
        ({"total_steps": 0}, "total_steps=0 must be above 0"),
        ({"checkpoint": {"keep": 0}}, r"checkpoint\.keep=0 must be above 0"),
        ({"data": {"dataset": "a/b", "label_fraction": 1.5}}, r"label_fraction=1.5 must be"),
        ({"data": {"dataset": "a/b", "caption_len": -1}}, r"caption_len=-1 must be at least 0"),
        ({"data": {"dataset": "a/b", "text_len": 0}}, r"text_len=0 must be above 0"),
        ({"data": {"dataset": "a/b", "vocab_size": 0}}, r"vocab_size=0 must be above 0"),
        ({"data": {"dataset": "a/b", "cache_mib": 0}}, r"cache_mib=0 must be above 0"),
        (
            {"model": {"variant": "tiny", "exit_layers": (4,), "sliding_window": -1}},
            r"model\.sliding_window=-1 must be at least 0",
        ),
        (
            {"model": {"variant": "tiny", "exit_layers": (4,), "final_logits_softcap": -30}},
            r"model\.final_logits_softcap=-30.0 must be at least 0",
        ),
        ({"eval": {"budget": 0.0}}, r"eval\.budget=0.0 must be above 0 and at most 1"),
        ({"eval": {"exit_threshold": 0.3}}, r"exit_threshold=0.3 is not within \[0.5, 1\]"),
        (
            {"eval": {"exit_confidence": "entropy", "exit_threshold": -0.1}},
            r"exit_threshold=-0.1 is not within \[0, 1\], where the confidence 'entropy' lies",
        ),
        ({"eval": {"exit_confidence": "cosinus"}}, "did you mean 'cosine'"),
        ({"calibration": {"delta": 1.0}}, r"calibration\.delta=1.0 must be above 0 and below 1"),
        ({"calibration": {"f1": 0.0}}, r"calibration\.f1=0.0 must be above 0"),
        ({"calibration": {"rounds": 1}}, r"calibration\.rounds=1 must be at least 2"),
        ({"calibration": {"f1": None, "tau": None}}, "nothing would be promised"),
        ({"calibration": {"bound": "normall"}}, "did you mean 'normal'"),
        ({"calibration": {"confidences": ("entropie",)}}, "did you mean 'entropy'"),
        ({"calibration": {"confidences": ()}}, r"calibration\.confidences is empty"),
        ({"loss": {"prototype": -1.0}}, r"loss\.prototype=-1.0 must be at least 0"),
        ({"eval": {"f1": "mean"}}, r"eval\.f1='mean'; "),
        (
            {"data": {"dataset": "a/b", "left_out": ("sounds",)}},
            r"data\.left_out names 'sounds'; did you mean 'sound'",
        ),
        ({"eval": {"test_split": "train"}}, "must not be the split trained on"),
        (
            {"optim": {"learning_rate": 1.0, "warmup_steps": 10}},
            r"optim\.warmup_steps=10 is not .* below total_steps=10",
        ),
        (
            {"optim": {"learning_rate": 1.0, "accumulate_steps": 3}},
            r"batch_size=8 is not divisible by optim\.accumulate_steps=3",
        ),
        ({"loss": {"token": 0, "class_": 0, "score": 0}}, "all 0, so nothing would be learned"),
        ({"loss": {"token": -1.0}}, r"loss\.token=-1.0 must be at least 0"),
        ({"loss": {"exit_weights": (1.0,)}}, r"loss\.exit_weights=\(1.0,\) must be one weight"),
        ({"loss": {"exit_weights": (0.0, 0.0)}}, "not all 0"),
        ({"loss": {"exit_weights": (2.0, -1.0)}}, "of at least 0"),
        ({"loss": {"exit_weights": (2.0, math.nan)}}, r"exit_weights\[1\]=nan must be a finite"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        build(**changes)


def test_all_that_is_left_out_is_listed_at_once():
    with pytest.raises(UserError, match="leaves out initialization, seed, total_steps"):
        from_config_dict(ml_collections.ConfigDict({}))


def test_overrides(file):
    config = from_file(
        file,
        [
            "optim.learning_rate=2e-4",
            "data.left_out=('sound',)",
            "data.dataset=synthetic/quickstart",
            "model.remat_policy=None",
            "eval.every_steps=2000",  # a group that the file leaves out
            "optim.learning_rate=3e-4",  # the last one counts
        ],
    )
    assert config.optim.learning_rate == 3e-4
    assert config.data.left_out == ("sound",)
    assert config.data.dataset == "synthetic/quickstart"
    assert config.model.remat_policy is None
    assert config.eval.every_steps == 2000
    assert from_file(file).eval.every_steps == 1000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"override 'seed' has no value; write --config\.seed=VALUE"),
        ("sed=1", "config field sed does not exist; did you mean 'seed'"),
        ("optim.rate=1", r"config field optim\.rate does not exist"),
        ("opt.learning_rate=1", "config field opt does not exist; did you mean 'optim'"),
        ("seed.x=1", r"seed\.x does not exist: seed is no group"),
        ("data=1", "data=1 must be a group"),
        ("data.left_out=sound", r"data\.left_out='sound' must be of type tuple"),
        ("seed=1e3", "seed=1000.0 must be of type int"),
        ("seed={[]: 1}", r"seed='\{\[\]: 1\}' must be of type int"),  # a literal of no value
        (f"seed={'-' * 100_000}1", "must be of type int"),  # too deep to parse
    ],
)
def test_wrong_overrides_are_named(file, override, message):
    with pytest.raises(UserError, match=message):
        from_file(file, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "gives no config: KeyError: 'get_config'; it must define"),
        ("def get_config(:", "gives no config: SyntaxError"),
        ("def get_config():\n    return 3", "gives no config: AttributeError"),
        ("import nothing_of_this_name", "gives no config: ModuleNotFoundError"),
    ],
)
def test_a_file_that_gives_no_config(tmp_path, text, message):
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(UserError, match=message):
        from_file(str(tmp_path / "config.py"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"missing\.py does not exist; .* configs/"):
        from_file(str(tmp_path / "missing.py"))


def test_save_and_load_are_inverse(tmp_path):
    config = build(data={"dataset": "a/b", "left_out": ("sound",)}, loss={"exit_weights": (1, 2)})
    config_lib.save(config, tmp_path / "config.json")
    assert config_lib.load(tmp_path / "config.json") == config
    assert json.loads((tmp_path / "config.json").read_text())["data"]["dataset"] == "a/b"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b""])
def test_load_refuses_what_is_no_config(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json is not the config of a run"):
        config_lib.load(tmp_path / "config.json")
    with pytest.raises(UserError, match="give the workdir of a finished run"):
        config_lib.load(tmp_path / "nothing.json")


def test_differences_are_dotted_fields():
    new = build(seed=3, optim={"learning_rate": 1e-4})
    assert config_lib.differences(build(), new) == [
        "seed: 0 -> 3",
        "optim.learning_rate: 0.001 -> 0.0001",
    ]
    assert config_lib.differences(new, new) == []


@pytest.fixture
def staged(tmp_path):
    """A file of three stages, and how they are read with overrides."""
    path = tmp_path / "staged.py"
    described = {
        "teacher": {"model": {"variant": "quickstart_teacher", "exit_layers": (8,)}},
        "mentor": {"total_steps": 7},
        "student": {},
    }
    own = values(stages=described, distill={"phi": 0.5, "psi": 0.25})
    path.write_text(
        f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({own!r})\n"
    )
    return lambda *overrides: config_lib.stages_from_file(str(path), overrides)


def test_stages_are_the_files_fields_with_their_own_in_place(staged):
    teacher, mentor, student = staged()
    assert [c.stage for c in (teacher, mentor, student)] == ["teacher", "mentor", "student"]
    assert (teacher.model.variant, mentor.model.variant) == ("quickstart_teacher", "tiny")
    assert (mentor.total_steps, student.total_steps) == (7, 10)
    assert student.data == teacher.data


def test_a_stage_learns_from_those_before_it_the_nearest_first(staged):
    teacher, mentor, student = staged()
    assert teacher.teachers == {}
    assert mentor.teachers == {"teacher": 0.5}
    assert list(student.teachers.items()) == [("mentor", 0.5), ("teacher", 0.25)]
    assert staged("distill.phi=0")[-1].teachers == {"teacher": 0.25}
    assert build(distill={"phi": 1.0}).teachers == {}  # of no stages


def test_overrides_hold_for_all_stages_or_for_one(staged):
    assert [c.total_steps for c in staged("total_steps=3")] == [3, 3, 3]
    assert [c.total_steps for c in staged("stages.mentor.total_steps=4", "total_steps=3")] == [
        3,
        4,
        3,
    ]
    assert [c.stage for c in staged("stage=mentor")] == ["mentor"]


def test_stages_do_not_change_one_another(staged):
    configs = staged("stages.mentor.optim.learning_rate=0.5", "stages.mentor.model.lora.rank=2")
    assert [c.optim.learning_rate for c in configs] == [1e-3, 0.5, 1e-3]
    assert [c.model.lora.rank for c in configs] == [0, 2, 0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage=mentors", r"stage='mentors'; did you mean 'mentor'\?"),
        ("stages.tutor.total_steps=3", r"override stages\.tutor\.total_steps: "),
        ("stages.mentor.total_stps=3", r"total_stps does not exist; did you mean 'total_steps'"),
        ("distill.direction=both", "distill.direction='both'"),
        ("distill.temperature=0", "distill.temperature=0.0 must be above 0"),
        ("distill.psi=-1", "distill.psi=-1.0 must be at least 0"),
        ("distill.top_k=0", "distill.top_k=0 must be above 0"),
        ("distill.layer_map=((2,3),)", r"\(2, 3\) must be 3 layers, counted from 1: the student"),
        ("model.lora.rank=-1", "model.lora.rank=-1 must be at least 0"),
        ("model.lora.base=nf4", "model.lora.rank=0 puts no adapters beside them"),
        ("model.lora.towers=('txt',)", "model.lora.towers names 'txt'"),
    ],
)
def test_mistakes_of_stages_are_named(staged, override, message):
    with pytest.raises(UserError, match=message):
        staged(override)


def test_a_stage_that_there_is_none_of_is_named():
    with pytest.raises(UserError, match=r"stages\.tutor is no stage"):
        build(stages={"tutor": {}})
    with pytest.raises(UserError, match="describes no stages"):
        build(stage="mentor")
