"""Configurations: what is written is checked, and every file in configs/ is a Serve config of ours."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from engines.config import EchoEngineConfig, LocalEngineConfig, RemoteEngineConfig
from engines.echo import EchoEngine
from engines.local import LocalEngine
from engines.remote import RemoteEngine
from gateway.checks import check_file
from gateway.config import GatewayConfig
from gateway.engine_factory import make_engine
from gateway.errors import ConfigError
from gateway.fleet import config_hash
from gateway.serve_file import load_serve_file
from tests.gateway.fakes import CARD, config

ROOT = Path(__file__).parent.parent.parent
HEAD = "applications:\n- import_path: gateway.app:build_app\n  args:\n    models:\n"
ECHO = HEAD + "    - {name: a, engine: {kind: echo}}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_loads_and_passes_its_checks(path: Path) -> None:
    file = load_serve_file(path)
    assert len(check_file(file)) == len(file.application.args.models)


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("applications: [", "not YAML"),
        ("- 1", "the whole file"),
        ("applications: []", "applications"),
        (
            HEAD + "    - {name: a, engine: {kind: echo}, colour: red}",
            "models.0.colour: Extra inputs are not permitted",
        ),
        (HEAD + "    - {name: a, engine: {kind: magic}}", "models.0.engine"),
        (HEAD + "    - {name: a, engine: {kind: echo, max_model_len: 1}}", "models.0.engine.echo.max_model_len"),
        (HEAD + "    - {name: 'a b', engine: {kind: echo}}", "models.0.name"),
        (HEAD + "    - {name: a, engine: {kind: echo}}\n    - {name: a, engine: {kind: echo}}", "more than once"),
        (
            ECHO.replace("  args:", "  args:\n    routing: {publish_period_s: 4}"),
            "publish_period_s is 4 and may be at most a third",
        ),
        ("speed: fast\n" + HEAD + "    - {name: a, engine: {kind: echo}}", "speed"),
        ("http_options: {port: 0}\n" + ECHO, "http_options.port"),
        ("http_options: {host: ''}\n" + ECHO, "http_options.host"),
        ("proxy_location: Foo\n" + ECHO, "proxy_location: Input should be 'HeadOnly' or 'EveryNode'"),
        ("proxy_location: Disabled\n" + ECHO, "proxy_location"),
        (ECHO + "\n  name: ''", "applications.0.name"),
        (ECHO + "\n  name: 'a#b'", "applications.0.name"),
        (ECHO + "\n  route_prefix: api", "applications.0.route_prefix"),
        (ECHO + "\n  route_prefix: /api/", "applications.0.route_prefix"),
        (ECHO.replace("gateway.app", "gateway.door"), "import_path: Input should be 'gateway.app:build_app'"),
    ],
)
def test_a_mistake_is_one_readable_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_serve_file(_file(tmp_path, text))
    assert words in caught.value.message
    assert str(tmp_path / "fleet.yaml") in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", ["- 1", "applications: {}", "applications: [3]", "http_options: 3\n" + ECHO, HEAD])
def test_mistakes_are_told_in_yamls_words(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_serve_file(_file(tmp_path, text))
    assert not {"instance", "tuple", "dictionary"} & set(caught.value.message.lower().split())


def test_prefixes_that_serve_takes_are_taken(tmp_path: Path) -> None:
    for prefix in ("/", "/api", "/llm/v2"):
        file = load_serve_file(_file(tmp_path, f"{ECHO}\n  route_prefix: {prefix}"))
        assert file.application.route_prefix == prefix


def test_another_address_keeps_the_rest(tmp_path: Path) -> None:
    file = load_serve_file(_file(tmp_path, "http_options: {host: localhost, port: 9000}\n" + ECHO))
    moved = file.at(None, 9001)
    assert (moved.http_options.host, moved.http_options.port) == ("localhost", 9001)
    assert moved.application == file.application


def test_a_missing_file_is_one_readable_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file or directory\.$"):
        load_serve_file(tmp_path / "none.yaml")


def _local(folder: Path, more: str = "") -> str:
    return HEAD + f"    - {{name: a, engine: {{kind: local, model: {folder}{more}}}, actor: {{num_cpus: 0.1}}}}"


def _model(tmp_path: Path, config_json: str = '{"model_type": "llama"}') -> Path:
    (tmp_path / "config.json").write_text(config_json)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (_local(Path("/no/such/folder")), "a: There is no folder"),
        (HEAD + "    - {name: a, engine: {kind: echo}, actor: {num_cpus: 9999}}", "reserves 10000 CPUs"),
        (HEAD + "    - {name: a, engine: {kind: echo}, actor: {num_cpus: 0, num_gpus: 99}}", "reserves 99 GPUs"),
        (
            HEAD + "    - {name: a, engine: {kind: remote, base_url: http://x/v1, model: m, api_key_env: NO_SUCH_KEY}}",
            "NO_SUCH_KEY is not set",
        ),
        (
            HEAD + "    - {name: a, engine: {kind: echo}}\n    state: {url: redis://x, password_env: NO_SUCH_WORD}",
            "NO_SUCH_WORD is not set",
        ),
        (
            HEAD + "    - {name: a, engine: {kind: echo}}\n    state: {url: rediss://x, ca_file: /no/such.pem}",
            "no file /no/such.pem",
        ),
    ],
)
def test_what_this_machine_cannot_serve_is_said_first(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_file(load_serve_file(_file(tmp_path, text)))
    assert words in caught.value.message


def test_a_folder_without_a_usable_model_is_named(tmp_path: Path) -> None:
    file = _file(tmp_path, _local(tmp_path))
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        check_file(load_serve_file(file))
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ConfigError, match="cannot be used"):
        check_file(load_serve_file(file))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="has no weights"):
        check_file(load_serve_file(file))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"has no tokenizer \(tokenizer\.json\)"):
        check_file(load_serve_file(file))
    _model(tmp_path, '{"model_type": "t5"}')
    with pytest.raises(ConfigError, match="t5"):
        check_file(load_serve_file(file))


def test_a_model_that_cannot_fit_is_refused_with_both_sizes(tmp_path: Path) -> None:
    text = _local(_model(tmp_path), f", kv_cache_bytes: {2**50}")
    with pytest.raises(ConfigError, match=r"need 1048576\.0 GiB, but this machine has [\d.]+ GiB"):
        check_file(load_serve_file(_file(tmp_path, text)))


def test_an_unset_kv_cache_counts_as_one_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = load_serve_file(_file(tmp_path, _local(_model(tmp_path))))
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2**30 + 1000}
    monkeypatch.setattr("gateway.checks.os.sysconf", pages.__getitem__)
    check_file(file)
    pages["SC_PHYS_PAGES"] -= 1
    with pytest.raises(ConfigError, match=r"need 1\.0 GiB"):
        check_file(file)


def test_a_place_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as caught:
        check_file(load_serve_file(_file(tmp_path, _local(Path("./no/such/folder")))))
    assert caught.value.message.count(str(ROOT)) == 1


def test_a_model_that_fits_is_summarised(tmp_path: Path) -> None:
    (summary,) = check_file(load_serve_file(_file(tmp_path, _local(_model(tmp_path)))))
    assert summary.as_dict() == {
        "name": "a",
        "kind": "local",
        "source": str(tmp_path),
        "num_replicas": 1,
        "weight_bytes": 1000,
        "drafter": "auto",
    }


def _drafter(tmp_path: Path, drafter: str) -> Path:
    (tmp_path / "target").mkdir(exist_ok=True)
    return _file(tmp_path, _local(_model(tmp_path / "target"), f", drafter: {drafter}"))


@pytest.mark.parametrize("kind", ["auto", "model"])
def test_a_draft_model_is_checked_as_the_target_is(tmp_path: Path, kind: str) -> None:
    draft = tmp_path / "draft"
    file = _drafter(tmp_path, f"{{kind: {kind}, model: {draft}}}")
    with pytest.raises(ConfigError, match=r"^a: drafter: There is no folder"):
        check_file(load_serve_file(file))
    draft.mkdir()
    with pytest.raises(ConfigError, match=r"^a: drafter: .* has no config\.json"):
        check_file(load_serve_file(file))
    _model(draft, '{"model_type": "t5"}')
    with pytest.raises(ConfigError, match=r"^a: drafter: .*t5"):
        check_file(load_serve_file(file))
    _model(draft)
    (draft / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"^a: drafter: .* has no tokenizer"):
        check_file(load_serve_file(file))
    _model(draft)
    (summary,) = check_file(load_serve_file(file))
    assert (summary.weight_bytes, summary.drafter) == (2000, f"{kind} with {draft}")
    assert f"drafter {kind} with {draft}, 0 MB" in summary.text()


@pytest.mark.parametrize("kind", ["none", "ngram", "suffix", "prediction", "auto"])
def test_a_drafter_without_a_model_needs_no_files(tmp_path: Path, kind: str) -> None:
    (summary,) = check_file(load_serve_file(_drafter(tmp_path, f"{{kind: {kind}}}")))
    assert (summary.weight_bytes, summary.drafter) == (1000, kind)


@pytest.mark.parametrize(
    ("drafter", "words"),
    [
        ("{kind: magic}", "drafter"),
        ("{kind: model}", "drafter.model.model: Field required"),
        ("{kind: ngram, max_draft_tokens: 0}", "drafter.ngram.max_draft_tokens"),
        ("{kind: ngram, draft_length: often}", "drafter.ngram.draft_length"),
        ("{kind: none, draft_length: 4}", "drafter.none.draft_length: Extra inputs are not permitted"),
        ("ngram", "drafter"),
    ],
)
def test_a_drafter_that_cannot_be_is_named(tmp_path: Path, drafter: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.local\.drafter") as caught:
        load_serve_file(_drafter(tmp_path, drafter))
    assert words in caught.value.message


def test_the_demo_drafts_with_its_own_small_model() -> None:
    first, second = check_file(load_serve_file(ROOT / "configs" / "demo.yaml"))
    assert first.drafter == f"auto with {ROOT / 'demo' / 'models' / 'draft'}"
    assert second.drafter == "auto"


def test_the_memory_of_a_draft_model_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "draft").mkdir()
    file = load_serve_file(_drafter(tmp_path, f"{{kind: model, model: {_model(tmp_path / 'draft')}}}"))
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2**30 + 2000}
    monkeypatch.setattr("gateway.checks.os.sysconf", pages.__getitem__)
    check_file(file)
    pages["SC_PHYS_PAGES"] -= 1
    with pytest.raises(ConfigError, match=r"need 1\.0 GiB"):
        check_file(file)


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError):
        config().log_level = "debug"  # type: ignore[misc]


def test_make_engine_makes_each_kind() -> None:
    assert isinstance(make_engine(EchoEngineConfig()), EchoEngine)
    assert isinstance(make_engine(RemoteEngineConfig(base_url="http://x/v1", model="m")), RemoteEngine)
    assert isinstance(make_engine(LocalEngineConfig(model="m")), LocalEngine)


def test_the_hash_names_configuration_and_engines() -> None:
    plain = config_hash(config(), [CARD])
    assert plain == config_hash(GatewayConfig.model_validate(config().model_dump()), [CARD])
    others = [
        config_hash(config(), []),
        config_hash(config(log_level="debug"), [CARD]),
        config_hash(config("b"), [CARD]),
    ]
    assert len({plain, *others}) == 4
    assert len(plain) == 16
