import pytest

from mcore_rl.config import RunConfig, dump_config, load_config, parse_config

MINIMAL = "name: demo\nmodel: {path: /models/tiny}\n"


@pytest.fixture
def config_file(tmp_path):
    def write(text: str = MINIMAL):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_overrides_lie_over_the_file(config_file):
    path = config_file(MINIMAL + "steps: 7\nbatch: {prompts_per_step: 4}\nalgorithm: {name: grpo, clip_high: 0.3}\n")
    overrides = ["batch.prompts_per_step=16", "algorithm.clip_low=0.1", "reward=[exact_match,'regex:#']"]
    config = load_config(path, overrides)
    assert (config.steps, config.batch.prompts_per_step) == (7, 16)
    assert config.algorithm.name == "grpo" and config.algorithm.fields == {"clip_high": 0.3, "clip_low": 0.1}
    assert config.reward == ["exact_match", "regex:#"]
    assert config.run_dir.as_posix() == "runs/demo"


def test_the_resolved_config_is_itself_a_config(config_file, tmp_path):
    config = load_config(config_file(), ["optimizer.lr=3e-4", "rollout.stop=['</s>']"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config))
    assert load_config(resolved) == config


def test_yaml_can_refer_to_itself(config_file):
    config = load_config(config_file("name: demo\nseed: 3\nmodel: {path: 'runs/warm_${seed}/hf'}\n"), ["seed=5"])
    assert config.model.path == "runs/warm_5/hf"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimiser.lr=1"], r"unknown key 'optimiser'; did you mean 'optimizer'"),
        (["optimizer.learning_rate=1"], r"unknown key 'optimizer.learning_rate'; did you mean .*allowed: lr, min_lr"),
        (["parallel.tpp=2"], r"did you mean 'parallel.tp'"),
        (["steps=many"], r"steps='many'"),
        (["optimizer.lr=0"], r"optimizer.lr=0: .*greater than 0"),
        (["model.dtype=fp8"], r"model.dtype='fp8': .*'float32' or 'bfloat16'"),
        (["steps"], r"override 'steps' is not of the form key.sub=value"),
        (["model.path=null"], r"model.path=None"),
        (["model=5"], r"model=5"),
    ],
)
def test_mistakes_are_named(config_file, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(config_file(), overrides)


def test_every_mistake_is_listed_at_once(config_file):
    with pytest.raises(ValueError) as error:
        load_config(config_file(), ["steps=0", "parallel.tp=0", "optimizer.lrr=1"])
    assert all(key in str(error.value) for key in ("steps=0", "parallel.tp=0", "optimizer.lr'"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: demo\n", "missing key 'model'"),
        ("name: demo\nmodel: {}\n", "missing key 'model.path'"),
        ("- a\n- b\n", "cannot be read|must be a mapping"),
        ("name: ${nowhere}\nmodel: {path: x}\n", "cannot be read"),
    ],
)
def test_broken_files(config_file, text, message):
    with pytest.raises(ValueError, match=message):
        load_config(config_file(text))


def test_yaml_that_does_not_parse(config_file):
    with pytest.raises(ValueError, match=r"run.yaml.*cannot be read"):
        load_config(config_file("name: [demo\n"))


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"'.*no.yaml' does not exist"):
        load_config(tmp_path / "no.yaml")


def test_a_config_cannot_be_changed():
    config = parse_config({"name": "demo", "model": {"path": "x"}})
    assert isinstance(config, RunConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 5


def test_extends(tmp_path):
    (tmp_path / "base.yaml").write_text("name: base\nsteps: 7\nmodel: {path: m}\noptimizer: {lr: 1.0e-3}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/child.yaml").write_text("extends: ../base.yaml\nname: child\noptimizer: {eps: 1.0e-4}\n")
    config = load_config(tmp_path / "sub/child.yaml", ["steps=9"])
    assert (config.name, config.steps, config.optimizer.lr, config.optimizer.eps) == ("child", 9, 1e-3, 1e-4)
    (tmp_path / "base.yaml").write_text("extends: sub/child.yaml\n")
    with pytest.raises(ValueError, match="extends itself"):
        load_config(tmp_path / "sub/child.yaml")
    (tmp_path / "base.yaml").unlink()
    with pytest.raises(ValueError, match="base.yaml.*does not exist"):
        load_config(tmp_path / "sub/child.yaml")
