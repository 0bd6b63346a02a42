"""benchmarks/gpu.py: every section runs, and nothing that goes wrong takes anything else with it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastattn.tools import op_cases
from fastattn.tools.bench import families, peers
from fastattn.tools.bench.gpu import command, environment, lanes, pictures, plan, speed, summary, targets
from fastattn.tools.bench.gpu.jobs import Context, Job, finite
from fastattn.tools.bench.gpu.search import Search, candidates, searches
from fastattn.tools.bench.workload import AttentionWorkload

ROOT = Path(__file__).resolve().parent.parent
DYING, RAISING, HANGING = "races d128-causal triton", "poison triton", "time decode tiny bfloat16"
WRONG = "candidate forward (2, 16) tiny 64x64x4x2xTruexFalsexFalse"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run in Triton's interpreter, in which a job raises, one dies, one hangs and a candidate is wrong."""
    pytest.importorskip("triton")
    if not (ROOT / "benchmarks" / "gpu.py").exists():
        pytest.skip("not a checkout")
    out = tmp_path_factory.mktemp("gpu")
    wrongs = (f"die={DYING}", f"raise={RAISING}", f"hang={HANGING}", f"wrong={WRONG}")
    injected = [argument for wrong in wrongs for argument in ("--inject", wrong)]
    arguments = ["--device", "cpu", "--out", str(out), "--lanes", "2", "--budget", "240", *injected]
    # Not installed, from another folder, and without what this process would have its children inherit.
    keep = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments],
        cwd=out,
        env=keep,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    lines = [json.loads(line) for line in (out / command.RESULTS).read_text(encoding="utf-8").splitlines()]
    return out, result, lines


def outcomes(lines):
    return {line["job"]: line["status"] for line in lines if line["section"] == "outcome"}


def test_what_goes_wrong_is_reported_and_nothing_else_is(run):
    _, result, lines = run
    assert outcomes(lines) == {DYING: "died", RAISING: "failed", HANGING: "hung"}, result.stdout + result.stderr
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    log = (run[0] / command.LOG).read_text(encoding="utf-8")
    assert "this was to be raised" in log
    assert "Traceback" in log


def test_every_section_has_records(run):
    _, _, lines = run
    checked = [line for line in lines if line["section"] == "numerics"]
    ops = {"attention", "softmax", "rms_norm", "feed_forward", "linear_cross_entropy"}
    others = {"attention_weights", "dropout", "varlen_attention", "paged_attention"}
    assert {line["op"] for line in checked} == ops | others
    assert {line["backend"] for line in checked} == {"triton", "reference"}
    assert all(line["ok"] for line in checked), [line for line in checked if not line["ok"]]
    timed = [line for line in lines if line["section"] == "speed"]
    assert {line["op"] for line in timed} == set(plan._TINY)
    for line in timed:
        assert line["median_us"] > 0
        assert line["figure"] > 0
        assert {"device", "commit", "row", "dtype", "error", "repeats"} <= line.keys()
        if line["who"] == "fastattn":
            assert line["served_by"] == ["triton"]
    assert {"fastattn", "torch SDPA", "torch eager"} <= {line["who"] for line in timed}
    # Of the row that hung with its peers, ours is there.
    decoded = [line["who"] for line in timed if line["op"] == "decode"]
    assert decoded == ["fastattn"]


def test_a_wrong_candidate_is_named_and_not_timed(run):
    from fastattn.kernels import tiles

    out, _, lines = run
    searched = [line for line in lines if line["section"] == "search"]
    (wrong,) = (line for line in searched if line.get("ok") is False)
    assert "x".join(map(str, wrong["tile"])) == WRONG.rsplit(" ", 1)[1]
    tables = json.loads((out / command.TILES).read_text(encoding="utf-8"))
    assert {table["table"] for table in tables} == {"forward", "product"}
    forward = next(table for table in tables if table["table"] == "forward")
    # What the table holds is timed whatever the check said of it: it is what others are compared with.
    assert set(forward["times_us"]) == {"64x64x4x2xTruexFalsexFalse", "64x32x4x1xTruexFalsexFalse"}
    place, literal = forward["literal"].split(" = ")
    assert place == "FORWARD[0][(2, 256)]"
    before = next(held for key, held in tiles.FORWARD[tiles.ANY].items() if key == (2, 256))
    assert set(eval(literal, {"Tile": tiles.Tile})) == set(before)


def test_the_files_are_few_and_small(run):
    pytest.importorskip("matplotlib")
    out, result, _ = run
    assert {path.name for path in out.iterdir()} == {
        "results.jsonl", "summary.md", "log.txt", "tiles.json", "attention.png", "roofline.png", "bandwidth.png",
    }  # fmt: skip
    for path in out.glob("*.png"):
        assert path.stat().st_size < 300_000
    text = (out / command.SUMMARY).read_text(encoding="utf-8")
    assert len(text) < 8000
    assert text in result.stdout
    for said in (DYING, RAISING, HANGING, "SIGABRT", "1 wrong", "says nothing of speed", "FORWARD[0]"):
        assert said in text, text


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert "no CUDA device" in said[0]
    assert not (tmp_path / "out").exists()


def test_a_budget_drops_the_least_important(tmp_path):
    found = []
    jobs = [Job(f"{k}", "numerics", "nothing of the kind", importance=-k, least=2.0 if k else 1e6) for k in range(3)]
    begin = time.monotonic()
    lanes.run(
        jobs,
        Context(device="cpu"),
        lanes=1,
        deadline=begin + 60.0,
        on_record=lambda job, record: None,
        on_outcome=found.append,
    )
    # The most important first; that for which no time would do is dropped, and said so.
    assert [(o.job.name, o.status) for o in found] == [("2", "failed"), ("1", "failed"), ("0", "dropped")]
    assert "KeyError" in found[0].error
    found.clear()
    lanes.run(jobs, Context(), lanes=1, deadline=begin, on_record=lambda *_: None, on_outcome=found.append)
    assert {o.status for o in found} == {"dropped"}


def test_a_child_is_used_again():
    """To start one takes seconds."""
    spare, found, processes = lanes.Spare(), [], []
    given = {"lanes": 1, "on_record": lambda *_: None, "on_outcome": found.append, "spare": spare}
    for name in ("first", "second"):
        lanes.run([Job(name, "numerics", "none")], Context(device="cpu"), deadline=time.monotonic() + 60.0, **given)
        child = spare.take({})
        spare.give(child)
        processes.append(child._process)
    assert processes[0] is processes[1]
    assert [o.status for o in found] == ["failed"] * 2
    assert spare.take({"OTHER": "1"}) is None
    assert processes[0].returncode is not None


def test_children_that_do_not_start_end_the_stage(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = []
    jobs = [Job(str(k), "numerics", "rule") for k in range(5)]
    lanes.run(
        jobs,
        Context(device="cpu"),
        lanes=1,
        deadline=time.monotonic() + 60.0,
        on_record=lambda *_: None,
        on_outcome=found.append,
    )
    assert [o.status for o in found] == ["died"] * 3 + ["dropped"] * 2
    assert "did not start" in found[0].error


@pytest.mark.parametrize("quick", [False, True])
def test_the_plan_for_a_gpu(quick):
    pytest.importorskip("triton")
    timed = plan.timings(quick=quick, tiny=False, device="cuda")
    checked = plan.checks(["triton", "reference"], quick=quick, tiny=False)
    assert {job.parameters["op"] for job in checked if job.kind == "rule"} == {*op_cases.FAMILIES, "large"}
    searched = plan.candidates(90, quick=quick, tiny=False)
    jobs = [*timed, *plan.warmings(timed), *checked, *searched]
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        sent = json.dumps(job.as_json())
        assert json.dumps(Job(**json.loads(sent)).as_json()) == sent
    rows = {(job.parameters["family"], job.parameters["row"]) for job in timed}
    known = ("attention", "decode", "packed", "paged", "softmax")
    wanted = {(f, name) for f in known for name, _ in families.rows(f, device="cuda")}
    assert rows >= wanted if not quick else rows & wanted
    # Every row that a target names is timed, in a quick run at least one of each.
    for aim in targets.AIMS:
        if aim.op != "softmax" and aim.rows:
            assert any((aim.op, row) in rows for row in aim.rows)
    first = min(checked, key=lambda job: job.importance)
    assert first.parameters["dtype"] == "bfloat16"


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_candidates_begin_with_what_the_table_holds(architecture):
    tiles = pytest.importorskip("fastattn.kernels.tiles")
    # No row of the grid computes attention weights.
    reached = {search.table for search in searches(quick=False, tiny=False)}
    assert reached == {*tiles.TABLES, "product"} - {"weights"}
    for search in searches(quick=False, tiny=False):
        assert isinstance(Search.of(json.loads(json.dumps(search.as_json()))), Search)
        found = candidates(search, architecture, quick=False, tiny=False)
        assert len(found) == len(set(found)) > 5, search.name
        if search.table in tiles.TABLES:
            table = tiles.TABLES[search.table][architecture]
            assert found[0] in {tuple(tile) for held in table.values() for tile in held}


def test_cases_follow_their_tensors_device():
    """A case that kept a mask or a target on the CPU would fail here as on a GPU."""
    for case in op_cases.cases():
        if case.op == "attention" and case.mask not in ("none", "all of them"):
            continue
        tensors = {name: t.to("meta", torch.bfloat16) for name, t in case.tensors(0).items()}
        for answer in (case.eager(tensors), case.ours(tensors, "triton")):
            assert {out.device.type for out in answer.values()} == {"meta"}


def line(who, median, **more):
    shape = {"section": "speed", "op": "attention", "row": "d128-8k", "direction": "forward", "dtype": "bfloat16"}
    rate = {"figure": 1e6 / median, "unit": "TFLOP/s", "flops": 1e12, "moved": 1e9, "memory_bytes": 5, "p20_us": median}
    return {**shape, "who": who, "median_us": median, **rate, **more}


def test_targets():
    records = [line("fastattn", 1600.0), line("torch SDPA (cuDNN)", 1580.0), line("torch SDPA (flash)", 3000.0)]
    found = list(targets.reached(records, {"copy": 4300.0}))
    (reached,) = found
    assert reached.aim.name == "attention forward d128, causal"
    assert math.isclose(reached.figure, 625.0)
    assert math.isclose(reached.share, 625 / 600)
    assert (reached.peer, reached.ratio) == ("torch SDPA (cuDNN)", 1580 / 1600)
    assert reached.met
    assert not next(targets.reached([line("fastattn", 1700.0)], {})).met
    decode = {"op": "decode", "row": "gpu", "figure": 3000.0, "unit": "GB/s"}
    (reached,) = targets.reached([line("fastattn", 1.0, **decode)], {"copy": 4000.0})
    assert math.isclose(reached.share, 3000 / 3400)
    loss = {"op": "linear_cross_entropy", "row": "8192x4096x131072", "direction": "forward + backward"}
    peer = line("torch eager", 2.0, **loss)
    (reached,) = targets.reached([line("fastattn", 1.0, **{**loss, "memory_bytes": 2e9}), peer], {})
    assert not reached.met
    (reached,) = targets.reached([line("fastattn", 1.0, **{**loss, "memory_bytes": 9e8}), peer], {})
    assert reached.met
    (reached,) = targets.reached([line("fastattn", 1.0, **{**loss, "memory_bytes": 2e9, "gradient_bytes": 1.1e9})], {})
    assert math.isclose(reached.memory, 9e8)
    forward = {"op": "feed_forward", "row": "any", "direction": "forward"}
    for memory, met in ((4, True), (6, False)):
        both = [line("fastattn", 1.0, **{**forward, "memory_bytes": memory}), line("torch eager", 1.5, **forward)]
        assert next(targets.reached(both, {})).met is met


def test_what_was_dropped_is_done_if_there_is_time(tmp_path):
    run = command.Run(tmp_path, Context(device="cpu", tiny=True), 40.0, 1)
    run.stage("first", [Job("late", "numerics", "no such", least=1e6)], run.at(1.0), alone=True)
    assert [r for r in run.records if r["section"] == "outcome"] == []
    assert run._rest("numerics") == []
    run._left["late"] = Job("late", "numerics", "no such")
    assert [job.name for job in run._rest("numerics")] == ["late"]
    run.finish()
    run.close()
    (outcome,) = (r for r in run.records if r["section"] == "outcome")
    assert (outcome["job"], outcome["status"]) == ("late", "dropped")
    assert "dropped for lack of time: 1 jobs" in (tmp_path / command.SUMMARY).read_text(encoding="utf-8")


def test_a_summary_of_much_is_short_and_of_nothing_too():
    many = [line("fastattn", 1.0 + k, row=f"row-{k}") for k in range(400)]
    failures = [
        {"section": "numerics", "op": "attention", "row": "r" * 200, "dtype": "bfloat16", "direction": "forward",
         "backend": "triton", "check": "against float64", "ok": False, "error": 1.0, "bound": 0.5, "tensor": "dq"}
    ] * 300  # fmt: skip
    broken = [{"section": "outcome", "job": f"job {k}", "status": "died", "error": "e" * 300} for k in range(300)]
    text = summary.text([{"section": "run", "limits": {"copy": 4300.0, "matmul": 790.0}}, *many, *failures, *broken])
    assert len(text) <= summary.MOST + 1
    assert "288 more failures" in text
    assert "and 288 more" in text
    assert "Nothing was timed" in summary.text([])


def test_pictures_of_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    assert pictures.draw([], {}, "nothing", tmp_path) == []
    rows = [line(who, 10.0 * k, row=row) for k, who in enumerate(("fastattn", "torch SDPA"), 1) for row in ("a", "b")]
    written = pictures.draw(rows, {"copy": 4300.0, "matmul": 790.0}, "some GPU", tmp_path)
    assert [path.name for path in written] == ["attention.png", "roofline.png"]


def test_json_gets_no_infinity():
    assert json.dumps(finite({"a": [float("inf"), 1.0], "b": float("nan")})) == '{"a": ["inf", 1.0], "b": "nan"}'


def test_nvidia_smi_is_not_needed(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.smi() == {}
    with environment.Sampler(seconds=0.01) as sampler:
        pass
    assert sampler.summary() == {}


def test_nvidia_smi_may_not_know_a_field(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$*" in *clocks_event*) echo "not a valid field"; exit 2;; *clocks.sm*) echo 1980;;'
        ' *power.draw*) echo "[N/A]";; *) echo 7;; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = environment.smi()
    assert found["SM clock, MHz"] == "1980"
    assert "reasons for lower clocks" not in found
    with environment.Sampler(seconds=0.01) as sampler:
        time.sleep(0.5)
    assert "power, W" not in sampler.summary()


def test_peers_are_those_of_the_device():
    on_cpu, on_gpu = ({peer.name for peer in peers.chosen(device=device)} for device in ("cpu", "cuda:0"))
    assert {"OpenVINO", "torch SDPA (math)"} <= on_cpu - on_gpu
    libraries = {"flash-attn 2", "flash-attn 3", "xformers", "liger-kernel", "quack"}
    bound = {f"torch SDPA ({name})" for name in ("flash", "cuDNN", "efficient", "math on a GPU")}
    assert libraries | bound <= on_gpu - on_cpu
    for peer in peers.PEERS:
        if peer.name in libraries and not torch.cuda.is_available():
            assert peer.unavailable()


def test_a_backward_is_timed_by_itself():
    torch.manual_seed(5)
    query, key, value, dout = (torch.randn(1, 2, 9, 8) for _ in range(4))
    whole = AttentionWorkload(query, key, value, dout, backward=True, causal=True)
    alone = AttentionWorkload(query, key, value, dout, backward=True, causal=True, alone=True)
    eager = peers.chosen(["torch eager"])[0]
    call = eager.call(alone)
    for _ in range(2):
        for a, b in zip(call(), eager.call(whole)(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("fault", ["", "wrong", "failing"])
def test_candidates_are_timed_beside_the_default_where_they_are_right(tmp_path, monkeypatch, fault):
    pytest.importorskip("triton")
    offer = (
        "def tiles_for(call, architecture):\n    from fastattn.kernels.launch import Tile\n    yield Tile(16, 16, 4, 1)"
    )
    (tmp_path / "made_up_kernels.py").write_text(offer)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(speed, "CANDIDATES", {"made_up_kernels": "made up", "not_there": "missing"})
    shape = {"batch": 1, "heads": [2, 1], "seq_len": [20, 20], "head_dim": 16, "causal": True}
    case, backward = families.FAMILIES["attention"]("tiny", shape, torch.bfloat16, "cpu")
    if fault:
        case = dataclasses.replace(case, error=(lambda: 1.0) if fault == "wrong" else lambda: 1 / 0)
    calls, notes = speed._variants(case, torch.bfloat16, Context(device="cpu"))
    if fault:
        assert not calls
        assert ("off by" if fault == "wrong" else "ZeroDivisionError") in notes["fastattn (made up)"]
        return
    assert notes == {}
    assert (calls["fastattn (made up)"]() - case.ours()).abs().max() < 0.05
    assert speed._variants(backward, torch.bfloat16, Context(device="cpu")) == ({}, {})
    # It is no peer.
    records = [line("fastattn", 2.0), line("fastattn (made up)", 1.0), line("torch SDPA", 3.0)]
    (reached,) = targets.reached(records, {})
    assert reached.peer == "torch SDPA"
    assert "d128-8k, forward, bfloat16: fastattn (made up) 2.00" in summary.text(records)


def test_loss_rows_compute_the_loss():
    for case in families.FAMILIES["linear_cross_entropy"]("row", [7, 16, 33], torch.float32, "cpu"):
        assert case.error() < 1e-5
        found = peers.ready(case.workload, peers.chosen(["torch eager"]))
        assert list(found.calls) == ["torch eager"]
        assert found.errors["torch eager"] < 1e-5
