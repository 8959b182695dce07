"""The ``--psa-*`` flags: one dataclass behind command line, YAML, JSON and keyword arguments."""

import json
import pickle
from importlib import resources

import pytest
from sglang_psa import server_args as module
from sglang_psa import state
from sglang_psa.server_args import PSAServerArgs, StartUpError, psa_config

from sgl_psa.config import PSAConfig, fields
from sgl_psa.policies import POLICIES

MODEL = str(resources.files("sgl_psa") / "assets" / "recall")
BASE = ["--model-path", MODEL]
PSA = [*BASE, "--attention-backend", "psa"]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No settings from outside, and the names that the plugin's ``register`` would add."""
    for field in fields():
        monkeypatch.delenv(f"SGL_PSA_{field.name.upper()}", raising=False)
    monkeypatch.setattr(state, "registration_error", None)
    from sglang.srt import server_args as sglang_args

    monkeypatch.setattr(sglang_args, "ServerArgs", PSAServerArgs)
    if "psa" not in sglang_args.ATTENTION_BACKEND_CHOICES:
        monkeypatch.setattr(
            sglang_args,
            "ATTENTION_BACKEND_CHOICES",
            sglang_args.ATTENTION_BACKEND_CHOICES,
        )
        sglang_args.ATTENTION_BACKEND_CHOICES.append("psa")


def parse(*argv):
    from sglang.srt.server_args import prepare_server_args

    return prepare_server_args(list(argv))


def test_defaults_are_the_configs():
    args = parse(*PSA)
    assert psa_config(args) == PSAConfig()
    assert args.page_size == 16
    assert args.get_attention_backends() == ("psa", "psa")


def test_every_field_has_a_flag_that_reaches_the_config(monkeypatch, tmp_path):
    monkeypatch.setattr(module.prefix_budgets, "check_prior", lambda *args: None)
    values = {
        "policy": "psa",
        "stop": "coverage",
        "coverage": 0.5,
        "delta": 0.25,
        "scorer": "two_level",
        "sketch_bits": 4,
        "summary_bits": 8,
        "group_pages": 3,
        "group_percent": 150,
        "sink_pages": 0,
        "recent_pages": 5,
        "min_context": 7,
        "correction_std": 2.0,
        "conservative": True,
        "compensate": True,
        "budget_pages": 40,
        "audit_rate": 0.5,
        "backend": "reference",
        "candidate_pages": 9,
        "predict": True,
        "predict_rho": 0.5,
        "budget_prior": "prior.json",
    }
    tiers = {
        "device_pool_bytes": "1.5M",
        "host_pool_bytes": 1 << 26,
        "host_path": str(tmp_path),
        "host_dtype": "int8",
        "placement": "lru",
        "pipeline": False,
    }
    assert set(values) | set(tiers) == {f.name for f in fields()}
    for given in (values, tiers):
        flags = [x for k, v in given.items() for x in (f"--psa-{k.replace('_', '-')}", str(v))]
        assert psa_config(parse(*PSA, *flags)) == PSAConfig(
            **{**given, **({"device_pool_bytes": 3 << 19} if given is tiers else {})}
        )


def test_a_policy_brings_its_scorer_into_the_arguments():
    assert parse(*PSA).psa_scorer == PSAConfig().scorer
    assert parse(*PSA, "--psa-policy", "topk").psa_scorer == POLICIES["topk"].scorers[0]
    assert parse(*PSA, "--psa-policy", "topk", "--psa-scorer", "hybrid").psa_scorer == "hybrid"


def test_what_does_not_go_with_the_policy_is_refused():
    with pytest.raises(StartUpError, match="scorer='sketch': policy oracle_top_p runs with exact"):
        parse(*PSA, "--psa-policy", "oracle_top_p", "--psa-scorer", "sketch")
    with pytest.raises(StartUpError, match=r"budget_pages=1: .*set budget_pages to 3 or more"):
        parse(*PSA, "--psa-policy", "swa", "--psa-budget-pages", "1")


def test_a_coverage_that_page_summaries_do_not_keep_is_warned_of(monkeypatch):
    hybrid = ["--psa-stop", "coverage", "--psa-scorer", "hybrid"]
    for flags, warned in (([], False), (hybrid, True), ([*hybrid, "--psa-conservative"], False)):
        found = []
        monkeypatch.setattr(
            module.logger, "warning", lambda text, *a, to=found: to.append(text % a)
        )
        parse(*PSA, *flags)
        assert len(found) == warned
        assert all("scorer hybrid" in text and "--psa-conservative" in text for text in found)


def test_compensation_without_good_estimates_is_refused():
    with pytest.raises(
        StartUpError, match=r"compensate=true: scorer hybrid .*set scorer to one of"
    ):
        parse(*PSA, "--psa-compensate", "--psa-scorer", "hybrid")


@pytest.mark.parametrize(
    "flags",
    [["--psa-predict", "--psa-compensate"], ["--psa-scorer", "box", "--psa-summary-bits", "8"]],
)
def test_triton_has_what_the_others_have(flags):
    assert parse(*PSA, "--psa-backend", "triton", *flags).psa_backend == "triton"


def test_boolean_flag_may_stand_alone():
    assert parse(*PSA, "--psa-conservative").psa_conservative is True
    assert parse(*PSA, "--psa-conservative", "false").psa_conservative is False


def test_precedence_flag_over_document_over_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SGL_PSA_DELTA", "0.5")
    monkeypatch.setenv("SGL_PSA_COVERAGE", "0.5")
    monkeypatch.setenv("SGL_PSA_GROUP_PAGES", "9")
    path = tmp_path / "psa.json"
    path.write_text(json.dumps({"delta": 0.4, "coverage": 0.4}))
    for document in (str(path), path.read_text()):
        args = parse(*PSA, "--psa-config", document, "--psa-delta", "0.3")
        assert (args.psa_delta, args.psa_coverage, args.psa_group_pages) == (0.3, 0.4, 9)


def test_yaml_of_sglang_takes_the_same_names(tmp_path):
    path = tmp_path / "server.yaml"
    path.write_text("psa-coverage: 0.7\npsa-stop: coverage\npsa-conservative: true\n")
    config = psa_config(parse(*PSA, "--config", str(path)))
    assert (config.coverage, config.stop, config.conservative) == (0.7, "coverage", True)


def test_keyword_arguments_as_sgl_engine_passes_them():
    args = PSAServerArgs(
        model_path=MODEL,
        attention_backend="psa",
        psa_coverage=0.6,
        psa_config={"stop": "coverage"},
    )
    assert (args.psa_coverage, args.psa_stop) == (0.6, "coverage")


def test_pickled_arguments_carry_the_resolved_values(monkeypatch):
    monkeypatch.setenv("SGL_PSA_DELTA", "0.5")
    args = parse(*PSA)
    monkeypatch.delenv("SGL_PSA_DELTA")
    assert psa_config(pickle.loads(pickle.dumps(args))).delta == 0.5


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--psa-coverage", "1.5"], ["--psa-coverage", "1.5", "<= 1"]),
        (["--psa-coverage", "0"], ["> 0"]),
        (["--psa-delta", "nan"], ["--psa-delta"]),
        (["--psa-stop", "never"], ["marginal, coverage"]),
        (["--psa-sketch-bits", "3"], ["1, 2, 4"]),
        (["--psa-group-pages", "2.5"], ["an integer"]),
        (["--psa-conservative", "maybe"], ["true or false"]),
        (["--psa-covrage", "0.5"], ["--psa-covrage"]),
    ],
)
def test_bad_flags_are_usage_errors(flags, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*PSA, *flags)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    "document, words",
    [
        ('{"covrage": 0.5}', ["covrage", "'coverage'"]),
        ('{"coverage": 2}', ["coverage", "<= 1"]),
        ('{"coverage": ', ["not valid JSON"]),
        ("/no/such/file.json", ["/no/such/file.json"]),
        ("[1]", ["[1]"]),
    ],
)
def test_bad_documents(document, words):
    with pytest.raises(StartUpError) as caught:
        parse(*PSA, "--psa-config", document)
    assert all(word in str(caught.value) for word in words)


def test_unknown_keyword_names_the_nearest():
    with pytest.raises(StartUpError, match=r"psa_covrage.*'psa_coverage'"):
        PSAServerArgs(model_path=MODEL, attention_backend="psa", psa_covrage=0.5)


@pytest.mark.parametrize("flags", [["--psa-delta", "0.2"], ["--psa-config", "{}"]])
def test_flags_without_the_backend_are_refused(flags):
    with pytest.raises(StartUpError, match=r"no effect without --attention-backend psa"):
        parse(*BASE, *flags)


def test_another_backend_is_left_alone():
    args = parse(*BASE, "--attention-backend", "torch_native", "--device", "cpu")
    assert args.page_size == 1
    assert args.psa_delta is None
    args.check_server_args()


def test_given_values_are_kept():
    args = parse(*PSA, "--page-size", "32", "--mem-fraction-static", "0.4", "--device", "cpu")
    assert (args.page_size, args.mem_fraction_static) == (32, 0.4)


def test_decode_only_keeps_the_prefill_backend():
    args = parse(
        *BASE,
        *("--prefill-attention-backend", "torch_native", "--decode-attention-backend", "psa"),
        *("--device", "cpu"),
    )
    assert args.get_attention_backends() == ("torch_native", "psa")
    assert args.page_size == 16


def test_decode_graph_is_off_unless_asked_for_and_then_refused():
    assert parse(*PSA).cuda_graph_config.decode.backend == "disabled"
    with pytest.raises(StartUpError, match="decode graph"):
        parse(*PSA, "--cuda-graph-backend-decode", "full")


def test_illegal_combination_is_refused_before_the_model_is_read():
    with pytest.raises(StartUpError, match="enable-mixed-chunk"):
        parse("--model-path", "/no/such", "--attention-backend", "psa", "--enable-mixed-chunk")


def test_missing_model_folder_is_named():
    with pytest.raises(StartUpError, match="'/no/such/model' does not exist"):
        parse("--model-path", "/no/such/model", "--attention-backend", "psa")


@pytest.mark.parametrize(
    "changes",
    [{"sliding_window": 128, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}],
)
def test_model_rows_read_the_models_config(changes, tmp_path):
    config = json.loads((resources.files("sgl_psa") / "assets/recall/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(StartUpError, match="sliding-window model"):
        parse(
            *("--model-path", str(tmp_path), "--attention-backend", "psa"),
            *("--load-format", "dummy", "--skip-tokenizer-init"),
        )


def test_registration_failure_stops_psa_and_nothing_else(monkeypatch):
    monkeypatch.setattr(state, "registration_error", RuntimeError("the reason"))
    with pytest.raises(StartUpError, match="the reason"):
        parse(*PSA)
    parse(*BASE, "--attention-backend", "torch_native", "--device", "cpu")


def test_a_model_that_forces_another_backend_is_not_served_without_psa(monkeypatch):
    original = PSAServerArgs.__base__._handle_attention_backend_compatibility

    def force(self):
        original(self)
        self.attention_backend = "triton"

    monkeypatch.setattr(PSAServerArgs.__base__, "_handle_attention_backend_compatibility", force)
    with pytest.raises(StartUpError, match="'triton' attention backend only"):
        parse(*PSA)


def test_check_verifies_the_hooks(monkeypatch):
    args, calls = parse(*PSA), []
    monkeypatch.setattr(module.hooks, "verify", lambda: calls.append(1))
    args.check_server_args()
    assert calls == [1]


def test_refusals_print_one_line_and_other_errors_a_traceback(capsys):
    seen = []
    hook = module._one_line(lambda *a: seen.append(a))
    error = StartUpError("psa and X: drop --x")
    hook(StartUpError, error, None)
    assert capsys.readouterr().err == "sgl-psa: error: psa and X: drop --x\n"
    hook(KeyError, KeyError("other"), None)
    assert len(seen) == 1


def test_cpus_have_no_overlap_scheduler_unless_asked_for(monkeypatch):
    monkeypatch.delenv("SGL_PSA_CPU_OVERLAP", raising=False)
    assert parse(*PSA).disable_overlap_schedule
    assert not parse(*BASE).disable_overlap_schedule, "without psa SGLang is as it was"
    monkeypatch.setenv("SGL_PSA_CPU_OVERLAP", "1")
    assert not parse(*PSA).disable_overlap_schedule
    assert parse(*PSA, "--disable-overlap-schedule").disable_overlap_schedule
    monkeypatch.setenv("SGL_PSA_CPU_OVERLAP", "yes")
    with pytest.raises(StartUpError, match="SGL_PSA_CPU_OVERLAP must be 0 or 1, got 'yes'"):
        parse(*PSA)
